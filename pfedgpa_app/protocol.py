"""The records and keys of messages between server and clients, which both import from here."""

# Records. The first three are called as Flower's `FedAvg` calls them.
ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
EXTRAS = "extras"
"""What a strategy and its clients exchange beside the model."""

# Of the config of a message.
SERVER_ROUND = "server-round"
FINGERPRINT = "fixed-weights"
"""The hash of the weights that the message does not contain: clients have them."""

# Metrics of a reply: to training, to evaluation, and to both.
NUM_EXAMPLES = "num-examples"
ACCURACY, LOSS = "accuracy", "loss"
ACCURACY_BEFORE, LOSS_BEFORE = "accuracy-before", "loss-before"
ACCURACY_AFTER, LOSS_AFTER = "accuracy-after", "loss-after"
SECONDS = "seconds"
IMAGE_MEAN, IMAGE_STD = "image-mean", "image-std"
PARTITION = "partition"
"""The client's partition and the number of all."""
EPSILON = "epsilon"
BUDGET_SPENT = "budget-spent"
"""Of a client that did not train, since that would exceed its privacy budget."""

BELOW_FLOOR = "below-privacy-floor"
"""Of a client that did not train, since the run is less private than its site demands."""

# What a node says of itself when it is asked: its partition, and in a record of its own its code.
PARTITION_ID = "partition-id"
SOURCE = "source"

CROSS_SITE = "cross-site"
"""Of the config of a question: whether the node consents to the cross-site matrix, as it answers
in its metrics; of an evaluation: that the model is that of any client, for the matrix."""

# Extras of pFedGPA.
COMMON = "common"
"""Sent to be asked for `HALVES`: the parameters from which both halves start."""
HALVES = "halves"
"""Uploaded: how two halves of the client's images move what is `COMMON`."""

# Of FedPAC, of which the server sends the first two and the client uploads all.
CLASS_MEANS, CLASS_COUNTS = "class-means", "class-counts"
WEIGHTED_MEANS, VARIANCE = "weighted-means", "variance"

# Of Floco, of which the client uploads the first.
ENDPOINTS, CENTER, HAS_REGION = "endpoints", "center", "has-region"

# Of IFCA: the number of the cluster that is sent as the model, the other clusters' models, and
# uploaded, the choice.
RECEIVED, CLUSTER, CHOICE = "received", "cluster", "choice"
