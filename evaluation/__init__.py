"""From catalogue scores to ranks, from ranks to metrics, from metrics to a report."""
