"""The records and keys of messages between server and clients."""

# Records. The first three names are those of Flower's `FedAvg`.
ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
EXTRAS = "extras"
"""Further tensors of a strategy."""

# Keys of CONFIG.
SERVER_ROUND = "server-round"
FINGERPRINT = "fixed-weights"
"""The hash of fixed weights that the message leaves out."""

# Keys of METRICS in replies.
NUM_EXAMPLES = "num-examples"
ACCURACY, LOSS = "accuracy", "loss"
ACCURACY_BEFORE, LOSS_BEFORE = "accuracy-before", "loss-before"
ACCURACY_AFTER, LOSS_AFTER = "accuracy-after", "loss-after"
# Of evaluation alone, where `pfedgpa_app.evaluation.scores_of` has them.
BALANCED_ACCURACY, MACRO_F1, AUROC = "balanced-accuracy", "macro-f1", "auroc"
CALIBRATION_ERROR = "calibration-error"
SCORES = (BALANCED_ACCURACY, MACRO_F1, AUROC, CALIBRATION_ERROR)
RECALL = "recall-"
"""Followed by the number of a class."""
SECONDS = "seconds"
IMAGE_MEAN, IMAGE_STD = "image-mean", "image-std"
PARTITION = "partition"
"""[partition-id, num-partitions] of the client."""
EPSILON = "epsilon"
# Set by a client that did not train, since that would exceed its privacy budget.
BUDGET_SPENT = "budget-spent"
# In the CONFIG of a reply: what a site demands that did not train, since the run is less private.
BELOW_FLOOR = "below-privacy-floor"

# Reply to a query: the partition, and in its own record the hash of the code.
PARTITION_ID = "partition-id"
SOURCE = "source"

CROSS_SITE = "cross-site"
"""In CONFIG of a query: to report consent to the cross-site matrix, in METRICS; in that of an
evaluation: that the model is any client's, for the matrix."""

# Extras of pFedGPA.
COMMON = "common"
"""Sent to request `HALVES`: the parameters from which training on both halves starts."""
HALVES = "halves"
"""Uploaded: sketches of the updates by training on two halves of the client's data."""

# Extras of FedPAC: the server sends the first two, the client uploads all.
CLASS_MEANS, CLASS_COUNTS = "class-means", "class-counts"
WEIGHTED_MEANS, VARIANCE = "weighted-means", "variance"

# Extras of FedDBE: uploaded in the first round, sent in the next ones.
FEATURE_MEAN = "feature-mean"

# Extras of pFedFDA, with CLASS_MEANS: sent and uploaded.
COVARIANCE = "covariance"

# Extras of Floco: the client uploads the first.
ENDPOINTS, CENTER, HAS_REGION = "endpoints", "center", "has-region"

# Extras of IFCA: the cluster whose model is in ARRAYS, the other clusters' models, and the uploaded
# choice.
RECEIVED, CLUSTER, CHOICE = "received", "cluster", "choice"
