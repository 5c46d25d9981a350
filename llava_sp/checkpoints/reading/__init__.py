"""What is in a folder of weights, with nothing opened."""
