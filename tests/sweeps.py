"""What `make test` leaves to `make test-all`, beside what tests mark themselves: on backends where
XLA compiles for minutes, cases whose operations are Keras's and which run on PyTorch, and cases
that differ from others by one size or one dtype."""

import re

# File, backends: what names of tests begin with; of classes by their name.
TABLE = """
test_directions, jax tensorflow: test_gradients test_masks_come_along test_stacks_in_files
    test_compiled_blocks test_bidirectional_in_a_model[large]
    test_a_stack_is_its_blocks_reversed_by_hand[alternate]
    test_a_stack_is_its_blocks_reversed_by_hand[both-large]
test_directions, tensorflow: test_errors[<lambda>-`segment_ids`
test_second_derivatives, tensorflow: test_against_differences[graph
test_second_derivatives, jax: test_against_differences[eager-plain
    test_against_differences[eager-single test_hessian test_a_gradient_penalty_trains_a_layer[sLSTM]
    test_a_gradient_penalty_trains_a_layer[mLSTM] test_a_gradient_penalty_trains_a_layer[mLSTMBlock
test_models, jax tensorflow: test_packing_and_padding[large]
    test_packed_training_is_training_on_the_documents[large] test_greedy_generation[large] test_lora
    test_optimizer_options test_mixed_precision[mixed_float16 test_sampling
    test_stack_in_a_functional_model
test_models, tensorflow: test_packed_training_is_training_on_the_documents[paper]
    test_replaced_weights_are_let_go test_mixed_precision test_packing_and_padding test_int8
    test_greedy_generation[paper
test_generation, jax tensorflow: test_repetition_penalty test_log_probs
    test_going_on_is_as_one_text[paper-greedy] test_going_on_is_as_one_text[paper-drawn]
    test_going_on_is_as_one_text[large test_the_state_of_rows_that_stopped test_a_generator
    test_a_processor test_stopping test_a_stop_sequence test_one_row test_its_size
    test_mixed_precision
test_user_ways, jax tensorflow: test_padding_and_ignored_labels_are_left_out_of_the_loss[True
    test_padding_and_ignored_labels_are_left_out_of_the_loss[False--100
    test_documents_of_sentences[4] test_scope_around_language_models test_scopes_around_models
    test_remat_gives_equal_gradients[xLSTMLargeBlock
    test_labels_beyond_the_vocabulary_are_refused[-100] test_clones
test_tensorflow, tensorflow: test_fit_on_a_ragged_last_batch[12] test_export[12]
    test_adam_by_one_operator_is_kerass[2] test_adam_by_one_operator_is_kerass[True]
    test_adam_by_one_operator_is_kerass[False] test_adam_by_one_operator_is_kerass[mixed
    test_unknown_batch_and_length[mlstm-native test_unknown_batch_and_length[slstm-native
    test_adam_by_one_operator_is_kerass[AdamW test_adam_of_few_digits
test_tensorflow_regions, tensorflow: test_programs_do_not_grow_with_the_blocks[8]
    test_as_without[native] test_as_without[mask] test_as_without[dropout] test_as_without[remat] test_as_without[large] test_other_dtypes
    test_a_stack test_gradients test_as_without[segments] test_what_a_compiled_function
    test_exported_without test_frozen_and_adapted test_files_and_eager_calls test_compiling_again
test_examples, jax tensorflow: test_tagging test_first_forecast[xlstm test_streaming
test_examples, tensorflow: test_forecasting test_first_forecast[lstm] test_state_tracking
test_docs, tensorflow: test_page[language_models] test_page[tagging] test_page[forecasting]
    test_page[classification] test_page[lstm] test_page[text test_page[loss
test_tutorials, jax: test_tutorial[prompt_cache]
test_replay, torch: test_compiled_blocks[paper]
test_keras_io, jax tensorflow: test_example[mLSTM-anomaly test_example[mLSTM-video
    test_example[mLSTM-sentiment] test_example[mLSTM-translation test_example[mLSTM-captcha
    test_example[mLSTM-traffic test_example[sLSTM-weather test_example[sLSTM-sentiment_masked
    test_example[sLSTM-addition test_example[sLSTM-character
    test_callback_of_the_docs_resets_states[mLSTM]
test_blocks, tensorflow: test_fits[False test_fits[True-large]
    test_gradients_of_packed_documents[large] test_remat_changes_nothing
test_blocks, jax: test_gradients_of_packed_documents[large] test_fits[False
test_layers, tensorflow: test_fits[mixed_bfloat16 test_learns[mlstm] test_encoder_decoder[mlstm]
    test_stacked_cells_fit[mixed test_time_distributed_and_subclassing[mlstm]
test_layer_contract, tensorflow: test_run_layer_test[Bidirectional(mLSTM
    test_run_layer_test[sLSTMCells
test_forecaster, tensorflow: test_fit_with_gaps[None] test_onnx
test_choices_of_sizes, tensorflow: test_layer_of_projections_in_blocks[12
test_poison, tensorflow: test_padding_of_layers[stack test_padding_of_layers[mlstm_block]
    test_padding_of_layers[large test_padding_of_layers[slstm_block
test_native, tensorflow: TestMLSTM::test_sizes[float16 TestMLSTM::test_sizes[bfloat16
    TestMLSTM::test_sizes[float64 TestMLSTM::test_split_anywhere[1 TestSLSTM::test_split_anywhere[1
    TestMLSTM::test_nothing_reaches_past_a_mask[rows] TestMLSTM::test_chunks_of_any_length[63]
    TestMLSTM::test_chunk_size_does_not_matter[4 TestMLSTM::test_chunk_size_does_not_matter[16-17]
    TestMLSTM::test_any_length[15] TestMLSTM::test_outputs_gradients_and_states[bfloat16-False]
    TestMLSTM::test_outputs_gradients_and_states[float64-False]
    test_inside_what_xla_compiles[float64
test_jax_triton, jax: TestSLSTM::test_fit_over TestSLSTM::test_vmap TestSLSTM::test_fit[symb
    TestMLSTM::test_fit_over TestMLSTM::test_vmap TestWide::test_options[all
test_pallas, jax: TestMLSTM::test_sizes[bfloat16 TestMLSTM::test_any_length[15]
    TestMLSTM::test_states_by_chunks[False TestMLSTM::test_masks_and_segments[left
    TestMLSTM::test_masks_and_segments[right TestMLSTM::test_nothing_reaches_past_a_mask[rows]
    test_mlstm_lowers_for_cuda_without_a_gpu[(4, 600, 2, 128, 256)-float16]
    test_mlstm_lowers_for_cuda_without_a_gpu[(1, 9000, 2, 256, 512)-float16]
    test_mlstm_lowers_for_cuda_without_a_gpu[(1, 9000, 2, 256, 512)-float32]
test_keras_export, tensorflow: test_cell[onnx-last-5 test_cell[tf_saved_model-language_model-5
    test_cell[openvino-masked-5 test_cell[onnx-slstm_block-5 test_a_batch_that_is_fixed[masked
test_keras_export, jax: test_cell[onnx-stack_both-5 test_cell[tf_saved_model-mlstm_block-None
    test_cell[onnx-language_model-None test_cell[onnx-stack-None test_cell[onnx-masked_both-None
test_keras_export, torch: test_cell[torch-stack-5 test_cell[openvino-stack-5
    test_a_batch_that_is_fixed[masked
test_export, tensorflow: test_files_in_their_own_runtimes[onnx
    test_files_in_their_own_runtimes[openvino
test_export, jax: test_files_in_their_own_runtimes[openvino
test_export, torch: test_files_in_their_own_runtimes[openvino
test_models, jax: test_packed_training_is_training_on_the_documents[paper
    test_replaced_weights_are_let_go
test_generation, tensorflow: test_steps_read_the_weights_as_they_are_by_then[paper
test_generation, jax: test_steps_read_the_weights_as_they_are_by_then[large
test_examples, jax: test_forecasting
test_keras_io, tensorflow: test_example[sLSTM-captcha test_example[sLSTM-translation
    test_example[sLSTM-video
test_keras_io, jax: test_example[sLSTM-captcha test_callback_of_the_docs
test_user_ways, tensorflow: test_documents_of_sentences test_remat_gives_equal_gradients
test_user_ways, jax: test_masks_of_parts test_both_names_of_the_forget_bias
test_docs, jax: test_page[language_models] test_page[states test_page[tagging]
    test_page[forecasting] test_page[classification] test_page[lstm] test_page[text
test_windows, tensorflow: test_fit
test_convert, jax tensorflow: test_outputs[v1
test_poison, jax: test_padding_of_layers[stack_in_a_model test_padding_of_layers[large_stack
test_fuzz, jax: test_blocks_in_two_parts
test_products, jax: test_a_language_model_trains_by_kerass_loss[sum-
test_devices, jax: test_kernels_over_heads[mlstm-whole test_kernels_over_heads[slstm-whole
test_triton_slstm, torch: TestWide::test_nan_reaches
"""


def _row(entry):
    where, names = entry.split(":", 1)
    file, backends = where.split(", ")
    return file, backends.split(), tuple(re.split(r"\s+(?=test_|Test)", names.strip()))


SWEEPS = [_row(entry) for entry in re.split(r"\n(?=\S)", TABLE.strip())]


def is_sweep(path, cls, name, backend):
    name = f"{cls.__name__}::{name}" if cls else name
    return any(
        path.stem == file and backend in backends and name.startswith(names)
        for file, backends, names in SWEEPS
    )
