"""The optimizers whose compilation, steps and memory the benchmarks measure: ``OPTIMIZERS``, name -> maker."""

import optax

import learned_opt

OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3),
    "muon": lambda: optax.contrib.muon(1e-2),
    "soap": lambda: learned_opt.soap(3e-3),
    "soap_muon": lambda: learned_opt.soap_muon(5e-3),
    "celo2": lambda: learned_opt.RULES["celo2"]().build(learned_opt.load_rule("flagship-1").theta),
    "adafac-mlp": lambda: learned_opt.load("adafac-mlp"),
    "flagship-1": lambda: learned_opt.load("flagship-1"),
    "flagship": lambda: learned_opt.load("flagship", num_steps=1000),
    "flagship-1-auto": lambda: learned_opt.load("flagship-1-auto", num_steps=1000),
}
