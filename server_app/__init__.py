"""The Flower ServerApp: strategies, checks of what clients send, and the run's folder."""
