"""Language Table (Lynch et al., RA-L 2023, arXiv 2210.06407): the options of `lapa data language-table`."""
