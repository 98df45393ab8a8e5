"""How fast and how good generation on a CPU is, beside what people use today: `fusedlm bench`."""
