"""What this node serves: models, their layers, and the stages of other entries' requests."""
