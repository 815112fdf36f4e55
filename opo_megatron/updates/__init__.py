"""Steps around a run other than OPO's own: SFT, other objectives, the variance report, NaN."""
