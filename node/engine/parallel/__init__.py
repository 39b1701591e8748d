"""One span computed by several worker processes of a node: tensor parallelism."""
