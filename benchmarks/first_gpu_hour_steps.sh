# shellcheck shell=bash disable=SC2034 # the caller reads what is set here
# The steps of first_gpu_hour.sh, which reads this file: their table, and the command of each in both forms.

# step | minutes at most on a GPU, with --cpu | what it needs | the step it builds on | what it answers
STEPS=(
    "tests                    15  5  torch,pytest               -        do the tests marked gpu pass?"
    "throughput               15  5  dali,deepspeed             -        how fast is training at 64 images a GPU?"
    "throughput-graphs        10  -  gpu,triton,dali,deepspeed  -        and with CUDA graphs?"
    "throughput-timer         10  5  dali,deepspeed             -        and with DeepSpeed's throughput timer?"
    "throughput-large         10  -  gpu,dali,deepspeed         -        how fast is training at 256 images a GPU?"
    "throughput-large-graphs  10  -  gpu,triton,dali,deepspeed  -        and with CUDA graphs?"
    "loader                   10  5  dali                       -        how many images do the CPU cores decode?"
    "augmentations            10  5  dali                       -        what does each augmentation cost, and is it right?"
    "tune                     20  -  gpu,triton                 -        which tiles are best? writes kernels/gpu/configs/"
    "kernel-speed             25  5  triton                     -        how near do the kernels come to their floors?"
    "evaluation               25  8  torch                      -        how fast are subnets scored at 224x224?"
    "evaluation-graphs        15  -  gpu,triton                 -        and with CUDA graphs?"
    "images                   10  2  torch                      -        (generates 60,000 images of 32x32)"
    "train                    15  5  dali,deepspeed             images   does a whole search work? training, shrinking,"
    "early-decisions           5  3  dali,deepspeed             train    images that deciding early saves in its steps,"
    "evolve                    5  3  dali,deepspeed             train    the search itself,"
    "retrain                  10  3  dali,deepspeed             evolve   its winner's training from scratch,"
    "export                    5  3  dali,onnxruntime           retrain  its ONNX files"
    "latency                  10  3  dali,onnxruntime           retrain  how fast is it in torch and ONNX Runtime?"
    "latency-tensorrt         15  -  gpu,dali,tensorrt          retrain  and in TensorRT?"
)

# From the caller: CPU (true or false), OUTPUT, PYTHON, and THERE, which says what is on this machine.
command_of() { # STEP -> COMMAND
    local size=() data=(--preset fashion-mnist --data.cache-dir "$OUTPUT/cache") run="$OUTPUT/run"
    local json=(--json "$OUTPUT/$1.json") cache=(--cache-dir "$OUTPUT/cache") graphs=()
    [[ $1 != *-graphs ]] || graphs=(env BSNAS_CUDA_GRAPHS=1)
    case $1 in
    tests)
        mapfile -t size < <(grep -rl --include='test_*.py' 'pytest.mark.gpu' tests)
        COMMAND=(-m pytest -m gpu -q -rs --junit-xml "$OUTPUT/tests.xml" "${size[@]}")
        ;;
    throughput*)
        size=(--batch-size 64 --rounds 9)
        [[ $1 != *-large* ]] || size=(--batch-size 256 --rounds 5)
        ! $CPU || size=(--preset digits --batch-size 4 --rounds 1)
        if [[ $1 == *-timer ]]; then
            echo '{"timers": {"throughput": {"enabled": true}}}' >"$OUTPUT/timer.json"
            size+=(--deepspeed-config "$OUTPUT/timer.json")
        fi
        COMMAND=(benchmarks/throughput.py "${size[@]}" "${cache[@]}" "${json[@]}")
        ;;
    loader)
        size=(--cases photographs resized --images 516 --rounds 3)
        ! $CPU || size=(--cases digits --batch-size 16 --batches 1 --rounds 1)
        COMMAND=(benchmarks/loader.py "${size[@]}" "${cache[@]}" "${json[@]}")
        ;;
    augmentations)
        size=(--images 516)
        ! $CPU || size=(--cases erase all --images 32 --batch-size 16 --batches 2 --rounds 1 --resolution 64)
        COMMAND=(benchmarks/loader_augmentations.py "${size[@]}" "${cache[@]}" "${json[@]}")
        ;;
    tune) COMMAND=(benchmarks/tune_kernels.py --batch 256 --seconds 900 "${json[@]}") ;;
    kernel-speed)
        ! $CPU || size=(--parts network folded --batch 2 --resolution 32 --rounds 1 --no-compile)
        ! $CPU || size+=(--results "$OUTPUT/kernel-speed.csv")
        COMMAND=(benchmarks/kernel_speed.py "${size[@]}" "${json[@]}")
        ;;
    evaluation*)
        size=(--device cuda --bf16 --resolution 224 --cases full-360)
        [[ $1 != evaluation ]] || size+=(shrunk-1000)
        ! $CPU || size=(--cases shrunk-36 --resolution 32 --images 64 --recalibration-images 64 --repeats 1
            --sequential-models 2 --train-steps 18)
        COMMAND=(benchmarks/evaluation.py "${size[@]}" "${cache[@]}" "${json[@]}")
        ;;
    images)
        size=(--train 50000 --test 10000)
        ! $CPU || size=(--train 400 --test 100)
        COMMAND=(benchmarks/miniatures.py --output "$OUTPUT/images" "${size[@]}")
        ;;
    train)
        if $CPU || [[ ${THERE[fashion-mnist]} == no ]]; then data+=(--data.source folder --data.path "$OUTPUT/images"); fi
        ! $CPU || size=(--data.val-per-class 10 --optimizer.batch-size 32 --optimizer.warmup-epochs 0
            --shrink.first-epochs 1 --shrink.interval-epochs 1 --shrink.models-per-operation 1)
        COMMAND=(engine/train.py --run "$run" "${data[@]}" "${size[@]}" "${json[@]}")
        [[ ! -f $run/config.json ]] || COMMAND=(engine/train.py --run "$run" --resume "${json[@]}")
        ;;
    early-decisions) COMMAND=(benchmarks/early_decisions.py --run "$run" "${json[@]}") ;;
    evolve)
        ! $CPU || size=(--population 6 --iterations 1)
        COMMAND=(search/evolve.py --run "$run" --max-macs 12M "${size[@]}" "${json[@]}")
        ;;
    retrain)
        ! $CPU || size=(--epochs 1)
        COMMAND=(engine/retrain.py --run "$run" --overwrite "${size[@]}" "${json[@]}")
        ;;
    export) COMMAND=(engine/export.py --run "$run" --precision fp32 fp16 "${json[@]}") ;;
    latency*)
        size=(--batch-sizes 1 32 256 --precisions fp32 fp16 --peers mobilenet_v2)
        ! $CPU || size=(--batch-sizes 1 --precisions fp32 --repeats 5 --passes 1 --max-seconds 0.2)
        if [[ $1 == latency ]]; then
            size+=(--backends torch-cpu torch-cuda onnxruntime-cpu onnxruntime-cuda)
        else # torch beside them, for the ratio
            size+=(--backends torch-cuda tensorrt tensorrt-graph tensorrt-rtx tensorrt-rtx-graph)
        fi
        COMMAND=(benchmarks/latency.py --run "$run" "${size[@]}" "${json[@]}")
        ;;
    esac
    COMMAND=("${graphs[@]}" "$PYTHON" "${COMMAND[@]}")
}
