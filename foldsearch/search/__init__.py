"""Who proposes (Optuna), who runs (Ray Tune), who stops: the only floor that knows either."""
