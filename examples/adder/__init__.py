"""HTTP, a queue, workers that add two numbers, and the sum all the way back."""
