"""What a user's YAML says, as frozen values: one default each, in one place.

``load_config`` is the only way in: YAML and overrides become a dataclass, strictly. ``to_yaml`` and
``describe`` are the ways out.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from envs.cryoem.synthetic import PRESETS
from envs.cryoem.types import ActionLevel, FeatureSet, NavigationConfig, Preset
from envs.crystfel.types import TuningConfig
from ssl2rl_ray import schema
from ssl2rl_ray.recipes import (
    A2CConfig,
    ACKTRConfig,
    AnyRainbow,
    AsyncA2CConfig,
    DQNConfig,
    NavigationAlgorithm,
    PolicyAlgorithm,
    PPOConfig,
    TuningAlgorithm,
    TuningPolicyAlgorithm,
    TuningPPOConfig,
    TuningValueAlgorithm,
    ValueAlgorithm,
)
from ssl2rl_ray.schema import (
    ConfigError,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    PositiveShare,
    Share,
    apply_override,
    build,
    read_yaml,
    show,
    words,
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where sessions come from. Paths are dataset folders, as ``ssl2rl import`` writes them."""

    train: tuple[str, ...] = ()
    """Sessions to train on; empty = synthetic sessions only."""
    validation: tuple[str, ...] = ()
    """Sessions on which the best checkpoint is selected, beside synthetic ones; never test data."""
    validation_grids: tuple[str, ...] = ()
    """Grids of the training sessions (by name) held out of training and used for validation."""
    calibration: str | None = None
    """Dataset folder whose stored calibration is used; None = fitted on the training sessions."""


@dataclass(frozen=True, kw_only=True)
class SessionsConfig:
    """What one training episode is played on: weights of three sources (they need not sum to 1)."""

    real: NonNegative = 0.0
    """A training session as it is, with its own labels."""
    redrawn: NonNegative = 0.0
    """A training session whose labels are drawn again from the calibrated model."""
    synthetic: NonNegative = 1.0
    """A session drawn afresh: structure, predictions and labels (domain randomisation)."""
    unlabelled: Share = 0.0
    """Share of training episodes whose drawn session has no labels: rewards are probabilities.

    Pseudo rewards carry no luck of the draw, so planning is learned from far fewer episodes.
    """
    preset: str = "aldolase"
    """Synthetic preset, see ``envs.cryoem.synthetic``."""
    pool_size: PositiveInt | None = 256
    """Sessions drawn once at the start and replayed; None = afresh each time (``rates`` only)."""
    budget_range_min: tuple[float, float] | None = None
    """Budgets drawn per episode; None = always ``env.budget_min``."""


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """``NavigationConfig`` by preset with changes; None keeps the preset's value."""

    preset: Preset = "paper"
    budget_min: float | None = None
    """Minutes."""
    low_ctf_threshold_A: Positive | None = None
    """Å."""
    is_threshold_inclusive: bool | None = None
    action_level: ActionLevel | None = None
    feature_set: FeatureSet | None = None
    num_past_steps: int | None = None
    num_candidates: int | None = None
    minutes: tuple[float, float, float, float] | None = None
    """Minutes of a move within the patch, to another patch, square, grid."""
    reward: tuple[Positive, Positive, Positive, Positive] | None = None
    """Reward of a low-CTF target reached by such a move."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how wide, and how often it is looked at."""

    num_env_steps: PositiveInt = 200_000
    num_env_runners: NonNegativeInt = 0
    """Remote env runners; 0 = in the algorithm's own process (best on few cores)."""
    num_envs_per_runner: PositiveInt = 32
    """Episodes in one numpy step."""
    rollout_length: PositiveInt = 8
    """Vector steps between rounds of updates."""
    num_torch_threads: PositiveInt = 2
    is_buffer_saved: bool = False
    """Checkpoints contain the replay buffer: a resumed run need not fill it again."""
    evaluation_interval_steps: PositiveInt = 20_000
    """Env steps between validations, checkpoints and progress lines."""
    num_validation_sessions: PositiveInt = 64
    """Synthetic (or redrawn) sessions of the validation, the same in every validation."""


@dataclass(frozen=True, kw_only=True)
class NavigationRunConfig:
    """``kind: navigation``: train a policy that chooses holes."""

    kind: Literal["navigation"] = "navigation"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    algorithm: NavigationAlgorithm = field(default_factory=DQNConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True, kw_only=True)
class PerceptionDataConfig:
    """Which images, which squares validate, which labels may be used."""

    dataset: str | None = None
    """Dataset folder with images, as ``ssl2rl import`` writes it; None = drawn by ``preset``."""
    preset: str = "y3-mini"
    """Synthetic preset with images, drawn from the run's seed, where no dataset is named."""
    validation_share: Positive = 0.25
    """Of the holes, in whole squares, held out of training (SSL²-RL, table 1: 2164 of 8653)."""
    labelled_fraction: PositiveShare = 0.05
    """Of the labelled training holes: how many labels are used; the others count as unlabelled."""
    validation_labelled_fraction: Share | None = 0.0
    """Of the validation holes: known to the hierarchical posterior, as in a session under way.

    The classifier never sees them, and nothing is reported on them. None: ``labelled_fraction``.
    """
    low_ctf_threshold_A: Positive = 6.0
    """Å; a hole is low-CTF below it (SSL²-RL, section 4)."""

    @property
    def known_fraction(self) -> float:
        """``validation_labelled_fraction`` as a number."""
        asked = self.validation_labelled_fraction
        return self.labelled_fraction if asked is None else asked


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The network that looks at a hole."""

    network: Literal["resnet18", "cnn", "head"] = "resnet18"
    """``resnet18`` (SSL²-RL, appendix B.2), or a CNN of 60,000 weights for machines without GPU.

    ``head`` (kind ssl2rl): a logistic head on the predictions that a session without images brings.
    """
    dropout: NonNegative = 0.5
    """Before the last layer (SSL²-RL, appendix B.2)."""
    initial: str | None = None
    """Run of kind perception whose classifier is the start; None = random weights."""


@dataclass(frozen=True, kw_only=True)
class PerceptionTrainingConfig:
    """One training stage."""

    method: Literal["supervised", "fixmatch", "finetuning"] = "fixmatch"
    """``supervised``: labelled holes only; ``fixmatch``: with consistency on unlabelled ones (Sohn
    et al. 2020); ``finetuning``: with pseudo labels from a file (SSL²-RL, section 3)."""
    num_epochs: PositiveInt | None = None
    """Passes over the labelled holes. None: as the method: 200, finetuning 40 (SSL²-RL, B.2)."""
    batch_size: PositiveInt = 64
    """Labelled images of a step, of all workers together."""
    learning_rate: Positive | None = None
    """Of SGD with Nesterov momentum, falling as cos(7 pi k / 16 K) (Sohn et al., section 2.4).

    None: as the method: 0.01, finetuning 0.001 (SSL²-RL, B.2).
    """
    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 5e-4
    """Of kernels, not of biases and normalisation (as in FixMatch)."""
    ema_decay: NonNegative = 0.99
    """Of the average of the weights, which predicts; less in the first steps."""
    unlabelled_ratio: PositiveInt = 4
    """uratio: unlabelled (or pseudo-labelled) images for each labelled one in a step."""
    unsupervised_weight: NonNegative = 1.0
    """ulb_loss_ratio, lambda; the paper has 5, which amplifies over-confident pseudo labels."""
    confidence_threshold: float = 0.8
    """p_cutoff, tau: FixMatch accepts predictions of at least this confidence."""
    is_aligned: bool = False
    """FixMatch: move predictions to the labelled share first (distribution alignment)."""
    num_warmup_epochs: NonNegativeInt = 0
    """FixMatch: epochs before the unsupervised term begins."""
    augmentation_strength: NonNegative = 1.0
    """FixMatch: of the strong view, see ``perception.augment``."""
    pseudo_labels: str | None = None
    """Finetuning: parquet file with ``hole_name``, ``is_low_ctf``, ``confidence``."""
    num_folds: NonNegativeInt = 5
    """Classifiers trained besides, each without a part of the labelled holes; 0 = none.

    What they say of that part gives the temperature and the hierarchical posterior.
    """
    evaluation_interval_epochs: PositiveInt = 1
    """Epochs between validations and checkpoints."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where it runs."""

    num_workers: NonNegativeInt = 0
    """Ray Train workers, which share each batch; 0 = in this process, without Ray."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: a GPU where torch sees one (one a worker), with bfloat16 arithmetic."""
    num_torch_threads: PositiveInt = 2
    """Of each worker."""


@dataclass(frozen=True, kw_only=True)
class PerceptionRunConfig:
    """``kind: perception``: train the classifier that guesses P(low-CTF) from a hole's image."""

    kind: Literal["perception"] = "perception"
    seed: int = 0
    data: PerceptionDataConfig = field(default_factory=PerceptionDataConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    training: PerceptionTrainingConfig = field(default_factory=PerceptionTrainingConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of SSL²-RL's tables: which f_0, which pseudo labels, which navigation."""

    pretraining: Literal["as configured", "supervised", "fixmatch", "full"] = "as configured"
    """f_0; ``full``: supervised by all labels of the training squares."""
    rule: str | None = None
    """Of ``loop.pseudo_labels.RULES``; ``none``: fine-tuned on the labelled holes only. None: f_0
    is all there is."""
    duration_min: float | None = None
    """Budget of the sessions on which its RL is trained; None: ``env.budget_min``."""
    navigator: str | None = None
    """A planner whatever ``loop.navigator`` says."""
    is_posterior_seen: bool = False
    """Its policy sees the hierarchical posterior's probabilities, not the classifier's alone."""
    is_rl_labelled_only: bool = False
    """RL is trained on the labelled holes only, on their true rewards."""
    is_movement_free: bool = False
    """Every move costs and earns what one within the patch does, in RL's training."""


METHODS: dict[str, Method] = {
    # SSL²-RL, tables 1 and 2
    "supervised": Method(pretraining="supervised"),
    "fixmatch": Method(pretraining="fixmatch"),
    "iterative-fixmatch": Method(rule="self"),
    "ssl2rl-120": Method(rule="visit-order", duration_min=120.0),
    "ssl2rl-480": Method(rule="visit-order", duration_min=480.0),
    "full-labels": Method(pretraining="full"),
    # controls: what else might explain a gain
    "labelled-only": Method(rule="none"),
    "ranking": Method(rule="ranking"),
    "planner": Method(rule="visit-order", navigator="lagrange"),
    "true-labels": Method(rule="truth"),
    # ours, beyond the paper
    "smooth": Method(rule="smooth"),
    "posterior": Method(rule="posterior", is_posterior_seen=True),
    "ssl2rl-posterior": Method(rule="visit-order", is_posterior_seen=True),
    "q-values": Method(rule="q-values"),
    # ablations, SSL²-RL, appendix C.4
    "labelled-rl": Method(rule="visit-order", is_rl_labelled_only=True),
    "no-movement-cost": Method(rule="visit-order", is_movement_free=True),
}
"""By the names that ``loop.methods`` knows."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """SSL²-RL's loop (Algorithm 1) and what it is compared with."""

    methods: tuple[str, ...] = ("fixmatch", "iterative-fixmatch", "ssl2rl-480")
    """Side by side on the same data from the same f_0, see ``config.METHODS``."""
    num_rounds: NonNegativeInt = 10
    """Rounds after f_0 (SSL²-RL, section 4)."""
    selection_share: float = 0.4
    """Of the validation squares' holes, in whole squares: rounds are chosen by them.

    The others are the test set: nothing is chosen by it, and reports quote it.
    """
    selection: Literal["reward", "accuracy", "auc"] = "reward"
    """Which criterion names the round that the run recommends; all are reported. Of a few selection
    holes the AUC tells rounds apart better than the accuracy, which one threshold decides."""
    positive_cutoff: float | None = None
    """N_C: share of the unlabelled holes that is labelled low-CTF. None: that of the labelled."""
    num_rollouts: PositiveInt = 5
    """M: visit orders of all holes, from random starts."""
    exploration: NonNegative = 0.5
    """Share of the spread of what the predictions do not say (random effects of grid, square and
    patch, and as much of each hole's own) that every roll-out draws for itself, so that the
    agreement of roll-outs means something; 0, or no folds in pretraining, which find the spread:
    they differ by their starts and checkpoints only."""
    navigator: Literal["algorithm", "lagrange", "rate-index"] = "algorithm"
    """Who navigates: RL, trained in every round, or a planner."""
    durations_min: tuple[Positive, ...] = (120.0, 480.0)
    """Minutes of the sessions on which policies are evaluated."""
    num_starts: PositiveInt = 20
    """Starts of each such session; the same for all methods and rounds."""
    max_fall: Positive = 0.03
    """The loop of a method ends where its accuracy on the selection squares is this much below its
    best for two rounds, or where its labels are nearly all of one kind."""
    pretraining_steps: PositiveInt | None = None
    """Steps of f_0 whatever the number of labels, instead of ``pretraining.num_epochs``."""
    finetuning_steps: PositiveInt | None = None
    """Steps of a round, instead of ``finetuning.num_epochs``."""


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig(PerceptionTrainingConfig):
    """Fine-tuning on labels and pseudo labels, the last stage of a round."""

    method: Literal["supervised", "fixmatch", "finetuning"] = "finetuning"
    num_folds: int = 0


@dataclass(frozen=True, kw_only=True)
class SSL2RLRunConfig:
    """``kind: ssl2rl``: classifier and policy improve each other, round after round."""

    kind: Literal["ssl2rl"] = "ssl2rl"
    seed: int = 0
    data: PerceptionDataConfig = field(default_factory=PerceptionDataConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    pretraining: PerceptionTrainingConfig = field(default_factory=PerceptionTrainingConfig)
    finetuning: FinetuningConfig = field(default_factory=FinetuningConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    algorithm: NavigationAlgorithm = field(default_factory=DQNConfig)
    rl: TrainingConfig = field(default_factory=TrainingConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def pretraining_run(self, method: str = "") -> PerceptionRunConfig:
        """f_0's run: as configured, or ``supervised``, ``fixmatch``, or ``full`` (all labels)."""
        training, data = self.pretraining, self.data
        if method in ("supervised", "full"):
            kept = {name: getattr(training, name) for name in _OF_EVERY_STAGE}
            training = PerceptionTrainingConfig(method="supervised", **kept)
        elif method == "fixmatch":
            training = dataclasses.replace(training, method="fixmatch")
        if method == "full":
            known = data.known_fraction
            data = dataclasses.replace(
                data, labelled_fraction=1.0, validation_labelled_fraction=known
            )
        return PerceptionRunConfig(
            seed=self.seed,
            data=data,
            classifier=self.classifier,
            training=training,
            compute=self.compute,
        )

    def finetuning_run(self, initial: str, pseudo_labels: str | None = None) -> PerceptionRunConfig:
        """A round's run; without pseudo labels, as many steps on the labelled holes only."""
        training: PerceptionTrainingConfig = self.finetuning
        rate = training.learning_rate or 0.001
        if pseudo_labels is None:
            kept = {name: getattr(training, name) for name in _OF_EVERY_STAGE}
            kept |= {"learning_rate": rate, "num_epochs": training.num_epochs or 40}
            training = PerceptionTrainingConfig(method="supervised", **kept)
        else:
            values: dict[str, Any] = {
                f.name: getattr(training, f.name) for f in dataclasses.fields(training)
            }
            training = PerceptionTrainingConfig(**{**values, "pseudo_labels": pseudo_labels})
        return PerceptionRunConfig(
            seed=self.seed,
            # labels known in validation squares are the posterior's, which a round does not fit
            data=dataclasses.replace(self.data, validation_labelled_fraction=0.0),
            classifier=dataclasses.replace(self.classifier, initial=initial),
            training=training,
            compute=self.compute,
        )

    def navigation_run(self, session: str, env: EnvConfig) -> NavigationRunConfig:
        """The policy's run of a round, on a dataset folder."""
        return NavigationRunConfig(
            seed=self.seed,
            data=DataConfig(train=(session,), calibration=session),
            sessions=SessionsConfig(real=1.0, synthetic=0.0),
            env=env,
            algorithm=self.algorithm,
            training=self.rl,
        )


_OF_EVERY_STAGE = (
    "num_epochs",
    "batch_size",
    "learning_rate",
    "momentum",
    "weight_decay",
    "ema_decay",
    "num_folds",
    "evaluation_interval_epochs",
)


@dataclass(frozen=True, kw_only=True)
class ExperimentsConfig:
    """The simulated experiments that an agent is trained on (domain randomisation)."""

    kind: Literal["normal", "wide"] = "wide"
    """See ``envs.crystfel.surrogate.draw_experiments``; validation is on ``normal`` ones."""
    pool_size: PositiveInt = 2048
    """Responses that differ; each episode gives one another start, geometry error and frames."""


@dataclass(frozen=True, kw_only=True)
class TuningTrainingConfig:
    """How long, how wide, and how often it is looked at."""

    num_env_steps: PositiveInt = 2_432_000
    """Evaluations of simulated experiments: 500 updates at 256 episodes of 19 steps."""
    num_env_runners: NonNegativeInt = 0
    """Remote env runners; 0 = in the algorithm's own process (best on few cores)."""
    num_envs: PositiveInt = 256
    """Experiments side by side in one numpy step, of each runner."""
    num_torch_threads: PositiveInt = 1
    evaluation_interval_steps: PositiveInt = 243_200
    """Env steps between validations, checkpoints and progress lines."""
    num_validation_experiments: PositiveInt = 256
    """Simulated experiments of the validation, the same in every validation and for all seeds."""


@dataclass(frozen=True, kw_only=True)
class CrystFELRunConfig:
    """``kind: crystfel``: train a policy that tunes the analysis of an SFX experiment."""

    kind: Literal["crystfel"] = "crystfel"
    seed: int = 0
    env: TuningConfig = field(default_factory=TuningConfig)
    experiments: ExperimentsConfig = field(default_factory=ExperimentsConfig)
    algorithm: TuningAlgorithm = field(default_factory=TuningPPOConfig)
    training: TuningTrainingConfig = field(default_factory=TuningTrainingConfig)


RunConfig = NavigationRunConfig | PerceptionRunConfig | SSL2RLRunConfig | CrystFELRunConfig
KINDS: dict[str, type[RunConfig]] = {
    "navigation": NavigationRunConfig,
    "perception": PerceptionRunConfig,
    "ssl2rl": SSL2RLRunConfig,
    "crystfel": CrystFELRunConfig,
}
"""The class of each ``kind``."""
SYNTHETIC_THRESHOLD_A = 6.0
"""Å; what synthetic sessions, and the calibrations that an import stores, call low-CTF."""


def load_config(
    path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """The config of a YAML file with ``a.b=value`` overrides; None = the defaults.

    Values of overrides are YAML too: ``training.num_env_steps=2e5``, ``data.train=[a, b]``.

    Raises:
        ConfigError: unreadable file, bad YAML, duplicate or unknown keys (with the nearest valid
            name), values of another type or out of range: all of them at once.
    """
    source = "config" if path is None else os.fspath(path)
    values = {} if path is None else read_yaml(source)
    if "base" in values and "space" in values:
        raise ConfigError([f"is a sweep of many runs: `ssl2rl sweep {source} --out DIR`"], source)
    for override in overrides:
        apply_override(values, override)
    return from_dict(values, source)


def from_dict(values: dict[str, Any], source: str = "config") -> RunConfig:
    """The checked config of plain values, the inverse of ``to_dict``; raises ConfigError."""
    kind = values.get("kind", "navigation")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError([f"kind: expected {words(KINDS)}, found {show(kind)}"], source)
    problems: list[str] = []
    config = build(KINDS[kind], values, "", problems)
    if not problems:
        problems += _problems(config)
    if problems:
        raise ConfigError(problems, source)
    return config


def check(config: RunConfig) -> None:
    """Raises ConfigError with everything that is out of range or does not go together."""
    if problems := list(_problems(config)):
        raise ConfigError(problems)


def navigation_config(env: EnvConfig) -> NavigationConfig:
    """The rules that the ``env`` section describes; raises ValueError where they are not valid."""
    changes = dataclasses.asdict(env)
    preset = changes.pop("preset")
    return NavigationConfig.preset(preset, **{k: v for k, v in changes.items() if v is not None})


def describe(config: RunConfig) -> str:
    """The config as YAML with what each field means above it; it can be loaded again."""
    return schema.describe(
        config, lambda part: navigation_config(part) if isinstance(part, EnvConfig) else None
    )


def own_version() -> str:
    """The version of this program, "unknown" where it is not installed."""
    try:
        return version("ssl2rl-ray")
    except PackageNotFoundError:
        return "unknown"


# ---------------------------------------------------------------- what goes together


def _problems(config: RunConfig) -> Iterator[str]:
    """Everything that is out of range or contradicts something else, each said once."""
    yield from dict.fromkeys(_all_problems(config))


def _all_problems(config: RunConfig) -> Iterator[str]:
    yield from schema.out_of_range(config)
    yield from _names_twice(config)
    if isinstance(config, SSL2RLRunConfig):
        yield from _ssl2rl_problems(config)
    elif isinstance(config, PerceptionRunConfig):
        yield from _perception_problems(config)
    elif isinstance(config, CrystFELRunConfig):
        yield from _crystfel_problems(config)
    else:
        yield from _navigation_problems(config)


def _ssl2rl_problems(config: SSL2RLRunConfig) -> Iterator[str]:
    """Those of its stages, by the names of this kind, and of the loop's own section."""
    loop, network = config.loop, config.classifier.network
    begun = dataclasses.replace(
        config,
        classifier=dataclasses.replace(
            config.classifier, initial=None, network="cnn" if network == "head" else network
        ),
    )
    found: dict[str, None] = {}  # one problem may be that of several stages
    for stage, name in (
        (begun.pretraining_run(), "pretraining"),
        (begun.finetuning_run("run", "labels"), "finetuning"),
        (begun.navigation_run("session", config.env), "rl"),
    ):
        found |= dict.fromkeys(p.replace("training.", f"{name}.") for p in _problems(stage))
    yield from (problem for problem in found if not problem.startswith("seed:"))
    if network == "head" and config.data.dataset is None:
        yield "classifier.network: head is for the predictions of a data.dataset without images"
    if network == "head":
        yield from _of_images_only(config)
    if config.classifier.initial is not None:
        yield "classifier.initial: the loop makes its own f_0; it is of kind perception"
    if config.pretraining.method == "finetuning":
        yield "pretraining.method: expected supervised or fixmatch, found finetuning"
    if config.finetuning.method != "finetuning":
        yield f"finetuning.method: expected finetuning, found {config.finetuning.method}"
    for stage in ("pretraining", "finetuning"):
        if getattr(config, stage).pseudo_labels is not None:
            yield f"{stage}.pseudo_labels: the loop makes its own"
    if config.finetuning.num_folds:
        yield "finetuning.num_folds: folds are of f_0 only; set pretraining.num_folds"
    for stage, steps in (
        ("pretraining", loop.pretraining_steps),
        ("finetuning", loop.finetuning_steps),
    ):
        if steps is not None and getattr(config, stage).num_epochs is not None:
            yield f"{stage}.num_epochs: loop.{stage}_steps says otherwise; drop one"
    if unknown := [name for name in loop.methods if name not in METHODS]:
        near = difflib.get_close_matches(unknown[0], METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {words(METHODS)}"
        yield f"loop.methods: {unknown[0]!r} unknown; {hint}"
    if not loop.methods or len(set(loop.methods)) < len(loop.methods):
        yield "loop.methods: name one or more, each once"
    if not loop.durations_min or len(set(loop.durations_min)) < len(loop.durations_min):
        yield "loop.durations_min: name one or more, each once"
    for name in ("selection_share", "positive_cutoff"):
        value = getattr(loop, name)
        if value is not None and not 0 < value < 1:
            yield f"loop.{name}: must be between 0 and 1, found {value}"
    is_all = config.data.labelled_fraction == 1 and config.data.dataset is None
    if is_all and set(loop.methods) - {"supervised", "full-labels"}:
        yield "data.labelled_fraction: 1 leaves nothing to label for the methods of the loop"
    methods = [METHODS[name] for name in loop.methods if name in METHODS]
    rules = {method.rule for method in methods}
    if "q-values" in rules and loop.navigator != "algorithm":
        yield f"loop.methods: q-values are of trained policies, loop.navigator is {loop.navigator}"
    if "q-values" in rules and isinstance(config.algorithm, PolicyAlgorithm):
        yield (
            f"loop.methods: q-values need action values, and {config.algorithm.name} learns none: "
            "set algorithm.name dqn or rainbow, or take the visit order (ssl2rl-480)"
        )
    if config.pretraining.num_folds == 0:
        if "posterior" in rules or any(method.is_posterior_seen for method in methods):
            yield "loop.methods: the posterior needs pretraining.num_folds of 2 or more"
        if loop.exploration not in (0, LoopConfig().exploration):
            yield "loop.exploration: the spread is what pretraining.num_folds of 2 or more find"
    try:
        env = navigation_config(config.env)
    except ValueError:
        return  # said above
    if env.low_ctf_threshold_A != config.data.low_ctf_threshold_A:
        yield (
            f"data.low_ctf_threshold_A: {config.data.low_ctf_threshold_A:g}, and "
            f"env.low_ctf_threshold_A is {env.low_ctf_threshold_A:g}; what is labelled and what is "
            "rewarded must be the same"
        )


def _of_images_only(config: SSL2RLRunConfig) -> Iterator[str]:
    """Settings that a head, which is solved exactly, does not read."""
    read = {
        "pretraining": ("method", "num_folds"),
        "finetuning": ("method", "num_folds", "unsupervised_weight", "pseudo_labels"),
    }
    for stage, names in read.items():
        asked, default = getattr(config, stage), type(getattr(config, stage))()
        for field_ in dataclasses.fields(asked):
            name = field_.name
            if name not in names and getattr(asked, name) != getattr(default, name):
                yield f"{stage}.{name}: is of image networks; a head is solved exactly"
    for name in ("pretraining_steps", "finetuning_steps"):
        if getattr(config.loop, name) is not None:
            yield f"loop.{name}: is of image networks; a head is solved exactly"


def _navigation_problems(config: NavigationRunConfig) -> Iterator[str]:
    data, sessions, env = config.data, config.sessions, config.env
    try:
        rules = navigation_config(env)
    except ValueError as error:
        yield f"env.{error}"
        return
    if sessions.preset not in PRESETS:
        yield f"sessions.preset: expected one of {words(PRESETS)}, found {sessions.preset!r}"
    if max(sessions.real, sessions.redrawn, sessions.synthetic) <= 0:
        yield "sessions: real, redrawn and synthetic are all 0; one needs a positive weight"
    for name in ("real", "redrawn"):
        if getattr(sessions, name) > 0 and not data.train:
            yield f"sessions.{name}: is above 0 but data.train names no session"
    if data.validation_grids and not data.train:
        yield "data.validation_grids: are grids of the training sessions, but data.train is empty"
    if both := sorted(set(data.train) & set(data.validation)):
        yield f"data.validation: {both[0]!r} is a training session; use data.validation_grids"
    is_drawn = sessions.redrawn > 0 or sessions.synthetic > 0
    if rules.feature_set != "rates" and is_drawn and sessions.pool_size is None:
        yield (
            f"sessions.pool_size: null (sessions afresh) needs env.feature_set rates, not "
            f"{rules.feature_set}; set a number such as 256"
        )
    if (budgets := sessions.budget_range_min) and not 0 < budgets[0] <= budgets[1]:
        yield f"sessions.budget_range_min: expected 0 < low <= high, found {list(budgets)}"
    if rules.low_ctf_threshold_A != SYNTHETIC_THRESHOLD_A:
        for name, is_used in (
            ("sessions.synthetic", sessions.synthetic > 0),
            ("data.calibration", data.calibration is not None),
        ):
            if is_used:
                yield (
                    f"{name}: its probabilities are of {SYNTHETIC_THRESHOLD_A:g} Å, while "
                    f"env.low_ctf_threshold_A is {rules.low_ctf_threshold_A:g}: fit on data.train "
                    "and play on sessions.redrawn or sessions.real"
                )
    algorithm, training = config.algorithm, config.training
    if rules.feature_set != "rates":
        if isinstance(algorithm, ValueAlgorithm) and algorithm.dueling:
            yield (
                "algorithm.dueling: a row is centred on the others in feature_set rates, not "
                f"{rules.feature_set}"
            )
        if algorithm.is_shaped:
            yield f"algorithm.is_shaped: the bound is in feature_set rates, not {rules.feature_set}"
        if algorithm.is_residual:
            yield (
                "algorithm.is_residual: the planner's surplus is in feature_set rates, not "
                f"{rules.feature_set}"
            )
    has_planner = rules.feature_set == "rates" and algorithm.is_residual is not False
    num_streams = max(1, training.num_env_runners) * training.num_envs_per_runner
    if isinstance(algorithm, PolicyAlgorithm):
        if not has_planner:
            yield from _ignored(algorithm, ("prior_scale",), "without the planner's surplus")
        if training.is_buffer_saved:
            yield f"training.is_buffer_saved: {algorithm.name} has no replay; leave it out"
        yield from _policy_problems(
            algorithm, num_streams * training.rollout_length, training.num_env_runners
        )
        return
    if algorithm.margin > 0 and not has_planner:
        yield "algorithm.margin: needs the planner: feature_set rates, and is_residual not false"
    yield from _value_problems(
        algorithm,
        num_streams=num_streams,
        rollout_length=training.rollout_length,
        num_env_steps=training.num_env_steps,
    )


def _value_problems(
    algorithm: ValueAlgorithm | TuningValueAlgorithm,
    *,
    num_streams: int,
    rollout_length: int,
    num_env_steps: int,
) -> Iterator[str]:
    """Of learning from replay, whatever the task."""
    if algorithm.final_learning_rate > algorithm.learning_rate:
        yield "algorithm.final_learning_rate: is above algorithm.learning_rate, from which it falls"
    if algorithm.epsilon_final > algorithm.epsilon_initial:
        yield "algorithm.epsilon_final: is above algorithm.epsilon_initial, from which it falls"
    if algorithm.buffer_capacity < algorithm.batch_size:
        yield "algorithm.buffer_capacity: is below algorithm.batch_size"
    if not algorithm.is_prioritized:
        yield from _ignored(
            algorithm,
            ("priority_exponent", "importance_exponent"),
            "by uniform replay; set is_prioritized too",
        )
    if isinstance(algorithm, AnyRainbow):
        yield from _rainbow_problems(algorithm)
    num_rows = max(2 * (algorithm.n_step + 1), rollout_length)
    if algorithm.buffer_capacity < num_rows * num_streams:
        yield (
            f"algorithm.buffer_capacity: {num_streams} episodes side by side need at least "
            f"{num_rows * num_streams}"
        )
    if algorithm.learning_starts >= num_env_steps:
        yield "algorithm.learning_starts: is not below training.num_env_steps; it would never learn"


def _rainbow_problems(algorithm: AnyRainbow) -> Iterator[str]:
    if not algorithm.is_noisy:
        yield from _ignored(algorithm, ("initial_noise",), "without noise; set is_noisy too")
        if algorithm.epsilon_initial == 0:
            yield "algorithm.epsilon_initial: is 0, and without is_noisy nothing explores: try 0.2"
    if algorithm.epsilon_initial == algorithm.epsilon_final:
        yield from _ignored(algorithm, ("epsilon_steps",), "by an epsilon that does not fall")
    if not algorithm.is_distributional:
        yield from _ignored(
            algorithm,
            ("num_atoms", "v_min", "v_max"),
            "by values that are numbers; set is_distributional too",
        )
    elif algorithm.num_atoms < 2:
        yield "algorithm.num_atoms: a distribution needs 2 or more; none is is_distributional false"
    low, high = algorithm.v_min, algorithm.v_max
    if low is not None and high is not None and low >= high:
        yield f"algorithm.v_min: expected below v_max, found {low:g} and {high:g}"


def _ignored(algorithm: Any, names: Sequence[str], why: str) -> Iterator[str]:
    """Settings that were changed although nothing reads them."""
    defaults = type(algorithm)()
    for name in names:
        if getattr(algorithm, name) != getattr(defaults, name):
            yield f"algorithm.{name}: is ignored {why}"


def _policy_problems(
    algorithm: PolicyAlgorithm | TuningPolicyAlgorithm, num_rows: int, num_env_runners: int
) -> Iterator[str]:
    """Of learning a policy from fragments of ``num_rows`` env steps, whatever the task."""
    if algorithm.final_learning_rate > algorithm.learning_rate:
        yield "algorithm.final_learning_rate: is above algorithm.learning_rate, from which it falls"
    if algorithm.final_entropy_weight > algorithm.entropy_weight:
        yield "algorithm.final_entropy_weight: is above entropy_weight, from which it falls"
    if isinstance(algorithm, PPOConfig) and algorithm.num_minibatches > num_rows:
        yield f"algorithm.num_minibatches: an update has only {num_rows} env steps"
    if isinstance(algorithm, A2CConfig | ACKTRConfig) and algorithm.n_step is not None:
        yield from _ignored(algorithm, ("trace_decay",), "by n-step returns; leave n_step out")
    if isinstance(algorithm, AsyncA2CConfig):
        if num_env_runners == 0:
            yield (
                "training.num_env_runners: async_a2c needs at least 1 beside its learner; or use "
                "algorithm.name a2c"
            )
        if algorithm.max_c > algorithm.max_rho:
            yield "algorithm.max_c: is above algorithm.max_rho"
    if isinstance(algorithm, ACKTRConfig):
        for name in ("momentum", "moment_decay"):
            if getattr(algorithm, name) == 1:
                yield f"algorithm.{name}: is 1, so that nothing new would count; try 0.9"


def _crystfel_problems(config: CrystFELRunConfig) -> Iterator[str]:
    algorithm, training, env = config.algorithm, config.training, config.env
    num_streams = max(1, training.num_env_runners) * training.num_envs
    if not isinstance(algorithm, TuningValueAlgorithm):
        yield from _policy_problems(
            algorithm, num_streams * env.num_steps, training.num_env_runners
        )
        return
    if env.action != "discrete":
        yield (
            f"env.action: {algorithm.name} learns what discrete changes are worth; set discrete, "
            "or algorithm.name ppo or a2c"
        )
    if isinstance(algorithm, AnyRainbow) and (
        algorithm.is_distributional and algorithm.v_min is None and env.time_cost > 0
    ):
        yield "algorithm.v_min: set it; env.time_cost makes returns negative, nobody knows how much"
    yield from _value_problems(
        algorithm,
        num_streams=num_streams,
        rollout_length=env.num_steps + 1,
        num_env_steps=training.num_env_steps,
    )


def _perception_problems(config: PerceptionRunConfig) -> Iterator[str]:
    data, training, compute = config.data, config.training, config.compute
    if config.classifier.network == "head":
        yield "classifier.network: head is of kind ssl2rl only"
    if data.preset not in PRESETS:
        yield f"data.preset: expected one of {words(PRESETS)}, found {data.preset!r}"
    if not data.validation_share < 1:
        yield f"data.validation_share: must be below 1, found {data.validation_share}"
    if data.dataset is not None and data.preset != PerceptionDataConfig().preset:
        yield "data.preset: is of synthetic samples, and data.dataset names a folder; drop one"
    if data.known_fraction > 0 and training.num_folds == 0:
        yield (
            "data.validation_labelled_fraction: is for the hierarchical posterior, which needs "
            "training.num_folds of 2 or more"
        )
    if data.known_fraction == 1:
        yield "data.validation_labelled_fraction: 1 leaves no hole to validate on"
    for name, value in (
        ("training.ema_decay", training.ema_decay),
        ("training.momentum", training.momentum),
        ("classifier.dropout", config.classifier.dropout),
    ):
        if value >= 1:
            yield f"{name}: must be below 1, found {value}"
    if not 0.5 <= training.confidence_threshold < 1:
        yield (
            "training.confidence_threshold: a confidence is between 0.5 and 1, found "
            f"{training.confidence_threshold}"
        )
    defaults, method = PerceptionTrainingConfig(), training.method
    for name, users in _STAGE_SETTINGS.items():
        if getattr(training, name) != getattr(defaults, name) and method not in users:
            yield f"training.{name}: is of {words(users)} only, and training.method is {method}"
    if method == "fixmatch" and data.labelled_fraction == 1 and data.dataset is None:
        yield (
            "data.labelled_fraction: 1 leaves nothing unlabelled for fixmatch; "
            "set training.method supervised, or a smaller fraction"
        )
    if method == "finetuning":
        if training.pseudo_labels is None:
            yield "training.pseudo_labels: finetuning needs the file of pseudo labels"
        if config.classifier.initial is None:
            yield "classifier.initial: finetuning needs the run whose classifier is to be tuned"
    if training.num_folds == 1:
        yield "training.num_folds: 1 would leave nothing to train on; 0 = none, else 2 or more"
    if training.num_warmup_epochs and training.num_warmup_epochs >= (training.num_epochs or 200):
        yield "training.num_warmup_epochs: is not below training.num_epochs"
    if compute.num_workers > 1 and training.batch_size % compute.num_workers:
        yield (
            f"training.batch_size: {training.batch_size} cannot be shared equally by "
            f"{compute.num_workers} workers"
        )


_STAGE_SETTINGS = {
    "unlabelled_ratio": ("fixmatch", "finetuning"),
    "unsupervised_weight": ("fixmatch", "finetuning"),
    "confidence_threshold": ("fixmatch",),
    "is_aligned": ("fixmatch",),
    "num_warmup_epochs": ("fixmatch",),
    "augmentation_strength": ("fixmatch",),
    "pseudo_labels": ("finetuning",),
}
"""Settings that only some methods read."""


def _names_twice(config: RunConfig) -> Iterator[str]:
    if not 0 <= config.seed < 2**32:
        yield f"seed: must be 0 or more and below 2**32, found {config.seed}"
    if not isinstance(config, NavigationRunConfig | CrystFELRunConfig):
        return
    if not config.algorithm.hidden_sizes:
        yield "algorithm.hidden_sizes: expected at least one layer"
    if not isinstance(config, NavigationRunConfig):
        return
    for name in ("train", "validation", "validation_grids"):
        values = getattr(config.data, name)
        if "" in values or len(set(values)) < len(values):
            yield f"data.{name}: a name is empty or there twice"
