from infra.images.lock_parts import IMAGES
from pipelines.recipe.registry import CORE_IMAGE, STAGE_IMAGES, STAGES, stage_folder, stage_image


def test_every_stage_has_one_of_the_images_and_core_is_for_no_stage() -> None:
    assert STAGE_IMAGES.keys() == {stage_folder(name) for name in STAGES}
    assert {CORE_IMAGE, *STAGE_IMAGES.values()} == set(IMAGES)
    assert CORE_IMAGE not in STAGE_IMAGES.values()


def test_stages_that_serve_a_model_run_where_vllm_is() -> None:
    images = {name: stage_image(name) for name in STAGES}
    assert {images[name] for name in ("search", "search-costs", "rl", "eval", "deploy")} == {"serve"}
    assert {images[name] for name in ("data", "pretrain", "distill", "sft")} == {"train"}
