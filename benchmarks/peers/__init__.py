"""What we are measured against, each as good as it is."""
