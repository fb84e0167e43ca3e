"""The fields of SAELens's `cfg.json`, of all versions: those that decide what an autoencoder computes, and the others.

Version 6 keeps what it says of model and text in `metadata`; before, everything was flat, with older names of some.
"""

from __future__ import annotations

RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""Names before version 4, and today's."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


COMPUTED = _names("""
    architecture d_in d_out d_sae dtype apply_b_dec_to_input normalize_activations reshape_activations activation_fn
    activation_fn_kwargs k rescale_acts_by_decoder_norm finetuning_scaling_factor
""")
"""Fields that decide what the autoencoder computes."""

METADATA = _names("""
    context_size dataset_path exclude_special_tokens hf_hook_name hf_hook_name_out hook_head_index
    hook_head_index_out hook_layer hook_layer_out hook_name hook_name_out model_class_name
    model_from_pretrained_kwargs model_name neuronpedia_id prepend_bos sae_lens_training_version sae_lens_version
    seqpos_slice
""")
"""Fields of model and text, which version 6 has in `metadata`."""

TRAINING = _names("""
    act_store_device activations_mixing_fraction adam_beta1 adam_beta2 autocast autocast_lm autocast_sae
    aux_loss_coefficient b_dec_init_method cached_activations_path checkpoint_path compile_llm compile_sae
    dataset_trust_remote_code dead_feature_estimation_method dead_feature_threshold dead_feature_window
    decoder_heuristic_init decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init device
    disable_concat_sequences eval_batch_size_prompts eval_every_n_wandb_logs expansion_factor feature_reinit_scale
    feature_sampling_method feature_sampling_window finetuning_method finetuning_tokens from_pretrained_path
    hook_eval hook_point_eval init_encoder_as_decoder_transpose is_dataset_tokenized jumprelu_bandwidth
    jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_ste_to_input jumprelu_tanh_scale l0_coefficient
    l0_lambda l0_warm_up_steps l1_coefficient l1_warm_up_steps llm_compilation_mode llm_device
    log_activations_store_to_wandb log_optimizer_state_to_wandb log_to_wandb log_weights_to_wandb logger lp_norm lr
    lr_decay_steps lr_end lr_scheduler_name lr_warm_up_steps matryoshka_widths model_kwargs mse_loss_normalization
    n_batches_for_norm_estimate n_batches_in_buffer n_checkpoints n_eval_batches n_restart_cycles noise_scale
    normalize_sae_decoder output_path pre_act_loss_coefficient prefetch_llm_batches resample_batches resume
    resume_from_checkpoint run_name sae_compilation_mode save_final_checkpoint
    scale_sparsity_penalty_by_decoder_norm seed sequence_separator_token sparsity_penalty store_batch_size
    store_batch_size_prompts streaming target_l0 tokens_per_buffer topk_threshold_lr total_training_steps
    total_training_tokens train_batch_size train_batch_size_tokens training_tokens use_cached_activations
    use_chat_formatting use_ghost_grads use_matryoshka_aux_loss use_sparse_activations verbose wandb_entity wandb_id
    wandb_log_frequency wandb_project
""")
"""Fields of SAELens's runner, training autoencoders and logging, versions 1 to 6."""
