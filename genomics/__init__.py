"""Genomics: DNA at the level of bases, as a domain of mamba2_apps."""
