"""pFedGPA: diffusion-based generative parameter aggregation (arXiv 2409.05701), without Flower."""
