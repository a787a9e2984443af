"""What a run has found: summary, figures, comparisons, exports."""
