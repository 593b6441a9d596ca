"""Algorithm 1 of SSL²-RL: perception and navigation improve each other."""
