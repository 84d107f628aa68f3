"""Look at a run: tables for the terminal, a page with pictures, the Optuna dashboard."""
