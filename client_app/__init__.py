"""The Flower ClientApp: local training and evaluation."""
