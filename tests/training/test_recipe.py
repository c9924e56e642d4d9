"""The typed recipe: what is read, what is refused, and that every recipe in recipes/ fits its model."""

from pathlib import Path

import pytest
from tiny import tiny_model

from llm_adapters import methods
from llm_adapters.bottleneck import placements
from llm_adapters.errors import RequestError
from llm_adapters.training.recipe import Recipe, load_recipe, upgraded_options

RECIPES = Path(__file__).parents[2] / "recipes"
# linear layers per decoder layer that the paper's recipes adapt
PAPER_PLACES = {"llama-7b-series": 2, "llama-7b-parallel": 2, "bloomz-7b-series": 1, "bloomz-7b-parallel": 2}
PAPER_PLACES |= {"gptj-6b-series": 1, "gptj-6b-parallel": 2}
FAMILY = {"llama": "llama", "bloomz": "bloom", "gptj": "gptj", "smollm2": "llama"}


def test_mappings_files_and_objects_give_the_same_recipe(tmp_path: Path) -> None:
    document = {"adapter": {"method": "series", "options": {"bottleneck_size": 8}}, "training": {"epochs": 1}}
    file = tmp_path / "recipe.yaml"
    file.write_text("adapter: {method: series, options: {bottleneck_size: 8}}\ntraining: {epochs: 1}\n")
    recipe = load_recipe(document)
    assert recipe == load_recipe(file) == load_recipe(str(file)) == load_recipe(recipe)
    assert recipe.adapter.options == {"bottleneck_size": 8}
    assert load_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"trainig": {}}, "trainig"),
        ({"training": {"epoch": 3}}, "epoch"),
        ({"training": {"epochs": "many"}}, "many"),
        ({"data": {"template": "alpacca"}}, "alpacca"),
        ({"training": {"micro_batch_tokens": 0}}, "micro_batch_tokens"),
        ({"training": {"learning_rate": 0}}, "learning_rate must be a number above 0, not '0'"),
        ({"training": {"learning_rate": float("nan")}}, "learning_rate must be a number above 0, not 'nan'"),
        ({"training": {"epochs": -1}}, "epochs must be a number above 0, not '-1'"),
        ({"data": {"limit": 0}}, "data.limit must be a whole number, at least 1"),
        ({"data": {"validation": 1.5}}, "validation is 1.5"),
        ({"training": {"keep_best": True}}, "keep_best needs a validation split"),
        ({"training": {"trackers": ["aim"]}}, "aim"),
        ({"model": {"dtype": "float16"}}, "train in bfloat16"),
        ({"training": {"max_grad_norm": None}}, r"training.max_grad_norm has no value \(null\)"),
        ({"evaluation": {"tasks": None}}, r"evaluation.tasks has no value \(null\)"),
        ({"training": {"warmup": float("inf")}}, "warmup must be a number that is at least 0, not 'inf'"),
        ({"training": {"seed": 2**40}}, "seed must be a whole number from 0 to"),
        ({"training": {"save_every": 10**30}}, "save_every must be a whole number"),
        ({"adapter": {"options": {"lora_alpha": float("nan")}}}, "adapter.options.lora_alpha is nan"),
        ({"adapter": {"options": {"r": object()}}}, "adapter.options.r is <object"),
        ({"adapter": {"options": {1: 2}}}, "keys are texts"),
        ({"adapter": {"options": ["r", 8]}}, "options must be a mapping"),
    ],
)
def test_what_is_wrong_is_named(document: dict[str, object], names: str) -> None:
    with pytest.raises(RequestError, match=names) as error:
        load_recipe(document)
    assert "\n" not in str(error.value)


def test_an_option_that_holds_itself_is_refused() -> None:
    endless: dict[str, object] = {}
    endless["again"] = [endless]
    with pytest.raises(RequestError, match="holds itself"):
        load_recipe({"adapter": {"options": endless}})


def test_a_tracker_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="mlflow, which is not installed: pip install mlflow"):
        load_recipe({"training": {"trackers": ["mlflow"]}})


def test_a_recipe_put_together_from_mappings_is_one() -> None:
    """As someone in a notebook writes it: the sections are plain mappings, or hold wrong types."""
    assert load_recipe(Recipe(adapter={"method": "ia3"})) == load_recipe({"adapter": {"method": "ia3"}})  # type: ignore[arg-type]
    wrong = Recipe()
    wrong.training.batch_size = "many"  # type: ignore[assignment]
    with pytest.raises(RequestError, match="batch_size must be a whole number"):
        load_recipe(wrong)


def test_what_is_recorded_of_a_recipe_are_plain_values() -> None:
    import yaml

    recipe = load_recipe({"data": {"limit": 4}, "training": {"epochs": "2", "micro_batch_size": 3}})
    assert yaml.safe_load(yaml.safe_dump(recipe.to_dict())) == recipe.to_dict()
    assert type(recipe.data.limit) is int


def test_the_names_of_earlier_versions_are_taken() -> None:
    document = {"training": {"accelerate": False}, "data": {"too_long": "cut"}}
    with pytest.warns(
        DeprecationWarning, match=r"training\.accelerate is deprecated: write training\.fast_paths"
    ) as told:
        recipe = load_recipe(document)
    assert told[0].filename == __file__  # Python shows deprecations of a user's own line alone
    assert (recipe.training.fast_paths, recipe.data.too_long) == (False, "truncate")
    assert document == {"training": {"accelerate": False}, "data": {"too_long": "cut"}}
    assert load_recipe(recipe.to_dict()) == recipe
    with pytest.raises(RequestError, match=r"training\.accelerate is the former name of training\.fast_paths"):
        load_recipe({"training": {"accelerate": True, "fast_paths": True}})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--training.accelerate", "false"], ["--training.fast_paths", "false"]),
        (["--training.accelerate=false"], ["--training.fast_paths=false"]),
        (["--data.too_long", "cut", "cut"], ["--data.too_long", "truncate", "cut"]),
        (["--data.too_long=cut"], ["--data.too_long=truncate"]),
        (["r.yaml", "--training.accelerated", "--training.epochs", "1"],) * 2,
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_options_of_earlier_versions_are_taken(words: list[str], expected: list[str]) -> None:
    assert upgraded_options(words) == expected


def test_an_option_under_both_names_is_refused() -> None:
    with pytest.raises(RequestError, match=r"give training\.fast_paths alone"):
        upgraded_options(["--training.fast_paths", "true", "--training.accelerate", "false"])


def test_a_missing_or_broken_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no recipe file"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("training: [")
    with pytest.raises(RequestError, match="not a YAML file"):
        load_recipe(broken)
    broken.write_text("3")
    with pytest.raises(RequestError, match="mapping"):
        load_recipe(broken)


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_fits_a_model_of_its_family(file: Path) -> None:
    recipe = load_recipe(file)
    model = tiny_model(FAMILY[file.stem.split("-")[0]])
    config = methods.adapter_config(recipe.adapter.method, model, **recipe.adapter.options)
    if config.peft_type.value == "BOTTLENECK":
        per_layer = {"series": 1, "parallel": 1} if "smollm2" in file.stem else PAPER_PLACES
        assert (
            len(placements(model, config)) == 2 * per_layer[file.stem.removeprefix("smollm2-gsm8k-")]
        )  # in both layers


def test_the_demo_trains_what_its_recipe_says() -> None:
    from llm_adapters.cli.demo import recipe

    expected = load_recipe(RECIPES / "smollm2-wordproblems.yaml")
    assert recipe("lora") == expected
    assert isinstance(expected, Recipe)
