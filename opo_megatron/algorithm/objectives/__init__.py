"""The objectives that OPO is compared with: one file per family, and the table of what each one needs."""
