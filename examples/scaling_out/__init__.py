"""Three HTTP processes, three workers, one of each killed half way, and nothing amiss."""
