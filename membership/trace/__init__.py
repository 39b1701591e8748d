"""Records what a membership core received and replays it."""
