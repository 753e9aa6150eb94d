"""What runs where the model is: data, capture, scoring, and the Ray actor around them."""
