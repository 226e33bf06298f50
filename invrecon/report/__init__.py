"""What a run leaves behind: volumes, tables, figures and a page; heavy imports happen when used."""
