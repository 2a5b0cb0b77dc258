"""The opponent's log-probs of all responses, computed once and cached on disk."""
