// Training of the byte-level language model: the same bits whether or not it was interrupted.
#pragma once

#include <turnout/checkpoint.h>
#include <turnout/chunk_trial.h>
#include <turnout/statistics.h>
#include <turnout/text.h>
#include <turnout/transformer.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace turnout {

struct TrainingOptions {
  int64_t batch = 8;             ///< sequences a step, each of the model's context
  int64_t steps = 1000;          ///< in all; the schedule ends here
  double learning_rate = 4e-3;   ///< at its peak
  double final_fraction = 0.05;  ///< learning rate at the end, as a fraction of the peak
  int64_t warmup_steps = 100;    ///< linear rise to the peak; a cosine follows
  double weight_decay = 0.1;     ///< of matrices; not of norms, biases, embeddings
  double beta1 = 0.9;            ///< AdamW, arXiv:1711.05101
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double clip = 1.0;           ///< largest norm of the whole gradient
  uint64_t seed = 0;           ///< of the batches, and of routing where it draws
  int64_t eval_bytes = 65536;  ///< held-out bytes that evaluate() predicts, at most
};

/// @throws c10::ValueError naming the first option that is impossible
void check(const TrainingOptions& options);
std::string to_json(const TrainingOptions& options);
/// @throws c10::ValueError naming the key that is missing, unknown or of the wrong type; then as check() does
TrainingOptions training_options_from_json(const std::string& text);

/// Learning rate of a step, counted from 0.
double learning_rate(const TrainingOptions& options, int64_t step);

/// Whether weight decay applies to a parameter: matrices, and banks of them; not norms, biases or the embedding.
bool decays(const std::string& name, const at::Tensor& parameter);

/// The loss or the gradient became NaN or Inf. The weights are those from before the step.
class DivergenceError : public std::runtime_error {
 public:
  DivergenceError(int64_t step, const std::string& where, const std::string& what);
  const int64_t step;       ///< counted from 1
  const std::string where;  ///< "embedding", "layer 2", "head" or "loss"
};

/// What the router of one sparse layer did in a step.
struct LayerReport {
  int64_t layer = 0;  ///< of the model, from 0
  RoutingStatistics statistics;        ///< of this rank's tokens, where there are several
  double logit_rms = 0;                ///< root of the mean square of the gate's logits
  double logit_max = 0;                ///< largest absolute one
  std::optional<double> balance_loss;  ///< before its coefficient; none where that is 0
  std::optional<double> z_loss;        ///< before its coefficient; none where that is 0
};

struct StepReport {
  int64_t step = 0;          ///< counted from 1
  double bits_per_byte = 0;  ///< of this batch, before the step
  double aux_loss = 0;       ///< what was added to the loss, in nats
  double gradient_norm = 0;  ///< before clipping
  at::Tensor expert_load;    ///< [sparse layers, experts] int64: rows that each expert got; undefined when dense
  int64_t choices = 0;       ///< tokens · top_k over all sparse layers
  int64_t dropped = 0;       ///< choices that found no place
  at::Tensor layer_dropped;  ///< [sparse layers] int64: the same a layer; undefined when dense
  std::vector<LayerReport> layers{};  ///< one a sparse layer, where the step was observed
  double report_seconds = 0;          ///< of this step that the loads, the drops and `layers` took
};

/// Trains one model by AdamW with warm-up, cosine and gradient clipping.
///
/// Batches are a function of (seed, step) alone, and routing that draws is seeded by them as well (which then sets
/// torch's default generators at each step): a resumed run needs no random state and reaches the bits of an unbroken
/// one, at one thread count. Parameters are float32.
///
/// A model on several ranks (model->layout): each rank has a Trainer with the same options and text, and every call is
/// made on all of them. A batch is cut into equal parts; reports, norms and evaluations are those of the whole.
class Trainer {
 public:
  /// @throws c10::ValueError when options are impossible, a part of the text is not longer than the context, or the
  ///         batch is no multiple of the ranks
  Trainer(ByteLanguageModel model, TrainingOptions options, std::shared_ptr<const ByteText> text);

  /// Forward, backward, update.
  /// @param observe fill StepReport::layers as well: some passes over the routers' scores
  /// @throws DivergenceError; c10::ValueError after the last step
  StepReport step(bool observe = false);

  /// Bits per byte over fixed, evenly spaced windows of the held-out text, each byte predicted from those before it
  /// in its window. Changes nothing: where routing draws, the random state is put back.
  double evaluate();

  int64_t steps_done() const { return steps_done_; }
  bool done() const { return steps_done_ >= options.steps; }
  /// Layouts of 0 chunks: what the first steps found.
  const ChunkTrial& chunk_trial() const { return chunk_trial_; }
  int64_t tokens_per_step() const { return options.batch * model->options.context; }

  /// Model, optimizer, step and options as one file's content, so that one rename replaces a checkpoint whole.
  /// Shares memory with the trainer. On several ranks: what this one has to write, experts one by one as NAME#NUMBER.
  TensorFile state() const;
  /// @param source how to call where it came from, such as a file's path
  /// @throws FileError when it was made with other options, another text, does not fit the model, or holds
  ///         numbers that are not finite. The number of ranks that made it does not matter
  void load_state(const TensorFile& state, const std::string& source);

  const TrainingOptions options;
  ByteLanguageModel model;

 private:
  struct Group {  // parameters that share a weight decay
    std::vector<std::string> names;
    std::vector<at::Tensor> parameters, averages, square_averages, steps;
    std::vector<bool> in_parts;  ///< this rank holds some experts of them
    double weight_decay = 0;
  };

  at::Tensor batch(int64_t step) const;
  void join(StepReport& report) const;
  double gradient_norm(const std::vector<std::vector<at::Tensor>>& gradients) const;
  std::map<std::string, at::Tensor> optimizer_tensors() const;
  std::map<std::string, ExpertRange> parts_in_state() const;
  double clip_and_update();
  void refuse_divergence(const at::Tensor& tokens, double loss);
  [[noreturn]] void refuse_gradient(double norm) const;

  StepReport make_step(bool observe);

  std::shared_ptr<const ByteText> text_;
  std::vector<Group> groups_;
  ChunkTrial chunk_trial_;
  int64_t steps_done_ = 0;
};

/// Writes a trainer's state under a folder. A kill at any moment leaves the newest whole one; older ones are removed.
///
/// One rank: FOLDER/checkpoint.safetensors. Several, on one file system: FOLDER/checkpoint-STEP/, a shard of each rank
/// that holds something of its own, and the index last.
/// @param metadata to put beside the trainer's own
/// @throws FileError, on every rank when one cannot write
void save_checkpoint(const std::string& folder, const Trainer& trainer,
                     const std::map<std::string, std::string>& metadata = {});

/// The newest whole checkpoint of a folder, mapped into memory, for any number of ranks.
struct Checkpoint {
  TensorFile state{};
  std::string path{};
};
/// @throws FileError when there is none
Checkpoint open_checkpoint(const std::string& folder);
/// Paths of whole checkpoints in a folder, oldest step first.
std::vector<std::string> find_checkpoints(const std::string& folder);

/// Options that a trainer's state was made with.
struct StateOptions {
  LanguageModelOptions model;
  TrainingOptions training;
};
/// @throws FileError when it is no trainer's state
StateOptions state_options(const TensorFile& state, const std::string& source);

}  // namespace turnout
