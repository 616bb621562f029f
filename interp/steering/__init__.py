"""Steering: directions and maps that change what a model says, and what they cost."""

from interp.steering.acting.clamp import LatentClamp, clamp_latents
from interp.steering.acting.exchange import from_gguf, from_tensors, from_torch, to_gguf
from interp.steering.acting.gate import GateFit, fit_gate
from interp.steering.acting.rowwise import rowwise
from interp.steering.concepts.causal import CausalConcepts, CausalGeometry, causal_concepts, causal_geometry
from interp.steering.concepts.compare import CompareOptions, compare_methods
from interp.steering.concepts.contenders import Contender, of_direction, sae_contender, trained_contender
from interp.steering.concepts.methods_table import MethodsTable
from interp.steering.concepts.observable import Observable, observable
from interp.steering.evaluating.ab import ABResult, ab_evaluation
from interp.steering.evaluating.calibrate import calibrate, token_kl
from interp.steering.evaluating.fluency import compression, distinct_n, generated_perplexity
from interp.steering.evaluating.judges import CachedJudge, LocalJudge, WordJudge
from interp.steering.evaluating.lines import random_like
from interp.steering.evaluating.open_ended import OpenEndedOptions, open_ended
from interp.steering.evaluating.open_ended_result import OpenEnded
from interp.steering.evaluating.openai_judge import OpenAIJudge
from interp.steering.evaluating.sweep import steering_sweep
from interp.steering.evaluating.sweep_options import Limits, SweepOptions
from interp.steering.evaluating.sweep_result import SteeringSweep
from interp.steering.fitting.direction_fit import DirectionFit, FitOptions, fit_with_controls
from interp.steering.fitting.fit import fit_direction
from interp.steering.fitting.latents import LatentScores, best_latent, latent_direction
from interp.steering.fitting.measure import measure_direction
from interp.steering.fitting.orthogonal import orthogonalised
from interp.steering.fitting.refusal import fit_refusal
from interp.steering.fitting.select import DirectionChoice, SelectOptions, select_direction
from interp.steering.function_vectors.decode import DecodedVector, decode_vector, reconstruct_vector
from interp.steering.function_vectors.effects import head_effects
from interp.steering.function_vectors.effects_result import HeadEffects
from interp.steering.function_vectors.evaluate import evaluate_function_vector
from interp.steering.function_vectors.heads import head_vectors, mean_head_activations
from interp.steering.function_vectors.options import ICLOptions
from interp.steering.function_vectors.scores import FunctionVectorScores
from interp.steering.function_vectors.vector import FunctionVector, compose_function_vectors, function_vector
from interp.steering.trained.loreft import LoReFT, fit_loreft
from interp.steering.trained.supervised import fit_reft_r1, fit_ssv, latent_activation
from interp.steering.trained.training import TrainedOptions
from interp.steering.trained.transport import Transport, fit_transport

__all__ = [
    "ABResult",
    "CachedJudge",
    "CausalConcepts",
    "CausalGeometry",
    "CompareOptions",
    "Contender",
    "DecodedVector",
    "DirectionChoice",
    "DirectionFit",
    "FitOptions",
    "FunctionVector",
    "FunctionVectorScores",
    "GateFit",
    "HeadEffects",
    "ICLOptions",
    "LatentClamp",
    "LatentScores",
    "Limits",
    "LoReFT",
    "LocalJudge",
    "MethodsTable",
    "Observable",
    "OpenAIJudge",
    "OpenEnded",
    "OpenEndedOptions",
    "SelectOptions",
    "SteeringSweep",
    "SweepOptions",
    "TrainedOptions",
    "Transport",
    "WordJudge",
    "ab_evaluation",
    "best_latent",
    "calibrate",
    "causal_concepts",
    "causal_geometry",
    "clamp_latents",
    "compare_methods",
    "compose_function_vectors",
    "compression",
    "decode_vector",
    "distinct_n",
    "evaluate_function_vector",
    "fit_direction",
    "fit_gate",
    "fit_loreft",
    "fit_reft_r1",
    "fit_refusal",
    "fit_ssv",
    "fit_transport",
    "fit_with_controls",
    "from_gguf",
    "from_tensors",
    "from_torch",
    "function_vector",
    "generated_perplexity",
    "head_effects",
    "head_vectors",
    "latent_activation",
    "latent_direction",
    "mean_head_activations",
    "measure_direction",
    "observable",
    "of_direction",
    "open_ended",
    "orthogonalised",
    "random_like",
    "reconstruct_vector",
    "rowwise",
    "sae_contender",
    "select_direction",
    "steering_sweep",
    "to_gguf",
    "token_kl",
    "trained_contender",
]
