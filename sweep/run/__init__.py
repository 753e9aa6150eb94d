"""One run on Ray: session, Tune experiment, worker pool, cluster and watchdog, progress and metrics."""
