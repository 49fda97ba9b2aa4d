"""How far loss, KL, ratio and gradient are from the exact ones, by size of the step, size of the latent and storage.

python -m bench.precision run [--quick] [--device cpu]   measures, into bench/results/
python -m bench.precision page FOLDER                     writes the tables of docs/precision.md and its figures
"""
