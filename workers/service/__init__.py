"""A worker on Ray: the actor, the model it holds, parts of tasks and their writers, metrics, node."""
