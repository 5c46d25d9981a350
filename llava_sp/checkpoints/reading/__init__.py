"""What stands in a folder of weights, with nothing opened."""
