// A linear model of routing evaluated on the GPU says what the host says, to the last bit: chances, scores, and what is known of each expert.
#include "check.h"
#include "cuda-fixture.h"
#include "cuda_linear.h"
#include "linear-fixture.h"

static __global__ void fate_evaluate_all(const __grid_constant__ fate_cuda_linear model, const __grid_constant__ fate_cuda_told told,
                                         const int32_t * index, const int32_t * n_experts, float * scores, float * chances) {
    extern __shared__ uint4 memory[];
    const int32_t           at   = static_cast<int32_t>(blockIdx.x);
    const auto              with = model.n_heads > 1 ? fate_evaluate<2> : fate_evaluate<1>;
    with(model, told, at, index[at], n_experts[at], MAX_K, told.ids + at * told.ids_stride, memory, scores + at * MAX_EXPERTS,
         chances + at * MAX_EXPERTS);
}

// The run that an eager model says the answers of; of: the device's layers among all.
static void test(const std::vector<int32_t> & of, int32_t capacity, bool has_scores, int32_t n_threads) {
    made_up                 made;
    const fate_linear_model model = made.model(capacity, has_scores);
    fate_linear             eager(model), linear(model);
    fate_cuda_evaluator     evaluator(linear, of);
    const int32_t           n       = steps(900);
    const int32_t           n_mine  = static_cast<int32_t>(of.size());
    int32_t * const         index   = device<int32_t>(n_mine);
    int32_t * const         experts = device<int32_t>(n_mine);
    int32_t * const         ids_of  = device<int32_t>(n_mine * MAX_K, 0xff);
    float * const           scores  = device<float>(n_mine * MAX_EXPERTS);
    float * const           chances = device<float>(n_mine * MAX_EXPERTS);
    std::vector<int32_t>    n_experts, ids(N_LAYERS * MAX_K);
    for (const int32_t l : of) {
        n_experts.push_back(made.n_experts[l]);
    }
    fate_cuda_upload(index, of.data(), n_mine * sizeof(int32_t));
    fate_cuda_upload(experts, n_experts.data(), n_mine * sizeof(int32_t));
    generator.seed(7);
    fate_linear_teller teller;
    int32_t            n_told = 0, n_wrong = 0, n_advances = 0;
    for (int32_t t = 0; t < n; ++t) {
        const made_token at = token_at(t, n);
        if (at.is_told) {
            linear.expect(at.token, at.sequence, at.position);
            const fate_linear_told & of_host = teller.tell(linear, t > 0);
            n_advances += of_host.advances;
            fate_cuda_told told = evaluator.put(n_told++ % 2, of_host);
            told.ids            = ids_of;
            told.ids_stride     = MAX_K;
            fate_evaluate_all<<<n_mine, n_threads, evaluator.n_bytes()>>>(evaluator.view(), told, index, experts, scores, chances);
            FATE_CUDA(cudaGetLastError());
            const std::vector<float> said = host(scores, n_mine * MAX_EXPERTS), likely = host(chances, n_mine * MAX_EXPERTS);
            eager.expect(at.token, at.sequence, at.position);
            const answer right = ask(eager);
            for (int32_t i = 0; i < n_mine; ++i) {
                for (int32_t e = 0; e < n_experts[i]; ++e) {
                    n_wrong += likely[i * MAX_EXPERTS + e] != right.chances[of[i] * MAX_EXPERTS + e];
                    n_wrong += has_scores && said[i * MAX_EXPERTS + e] != right.scores[of[i] * MAX_EXPERTS + e];
                }
            }
        }
        ids = route(made);
        std::vector<int32_t> mine;
        for (const int32_t l : of) {
            mine.insert(mine.end(), &ids[l * MAX_K], &ids[l * MAX_K] + MAX_K);
        }
        fate_cuda_upload(ids_of, mine.data(), mine.size() * sizeof(int32_t));
        eager.observe(ids.data(), at.token, at.sequence);
        linear.step(made_step(ids, at).view(), /*defers =*/true);
    }
    CHECK(n_wrong == 0);
    CHECK(n_told > n / 2 && n_advances > n / 3 && n_advances < n_told);
    const std::vector<float> bonus = host(evaluator.view().bonus, N_LAYERS);
    CHECK(!has_scores || bonus == made.bonus);
    for (void * p : { static_cast<void *>(index), static_cast<void *>(experts), static_cast<void *>(ids_of), static_cast<void *>(scores),
                      static_cast<void *>(chances) }) {
        FATE_CUDA(cudaFree(p));
    }
}

int main() {
    for (const int32_t capacity : { 2, 6, 60 }) {
        for (const bool has_scores : { true, false }) {
            test({ 0, 1, 2 }, capacity, has_scores, FATE_BESIDE_THREADS);
            test({ 2, 0 }, capacity, has_scores, 32); // fewer threads than experts
        }
    }
    return check_result("test-cuda-linear");
}
