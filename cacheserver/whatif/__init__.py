"""What another cache would have done: traces of a running service, their replay, and forecasts from request logs."""
