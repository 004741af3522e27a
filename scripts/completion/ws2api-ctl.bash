# Completion of ws2api-ctl for bash. Made by scripts/completion.py --write.

_ws2api_ctl() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
    local words command='' i
    # bash makes words of their own of = and :, as in --admin=http://127.0.0.1:7003
    [[ $word == '=' ]] && word=''
    [[ $before == '=' ]] && before=${COMP_WORDS[COMP_CWORD - 2]}
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            --admin | --push | --admin-token | --push-token | --config | --timeout | --limit | --cursor | --worker | --file | --generation | --code | --reason | --kind | --seconds | --output)
                i=$((i + 1)) ;;
            status | clients | client | tail | push | close | drain | reload | profile | errors)
                command=${COMP_WORDS[i]}
                break ;;
        esac
    done
    case $before in
        --config | --file | --output)
            compopt -o filenames 2>/dev/null
            mapfile -t COMPREPLY < <(compgen -f -- "$word")
            return ;;
        --kind) words='cpu memory' ;;
        --admin | --push | --admin-token | --push-token | --timeout | --limit | --cursor | --worker | --generation | --code | --reason | --seconds)
            COMPREPLY=()
            return ;;
        *)
            case $command in
                status) words='-h --help --admin --push --admin-token --push-token --config --timeout --json --watch' ;;
                clients) words='-h --help --admin --push --admin-token --push-token --config --timeout --json --limit --cursor --all --worker' ;;
                client) words='-h --help --admin --push --admin-token --push-token --config --timeout --json' ;;
                tail) words='-h --help --admin --push --admin-token --push-token --config --timeout --json' ;;
                push) words='-h --help --admin --push --admin-token --push-token --config --timeout --json --file --binary --generation' ;;
                close) words='-h --help --admin --push --admin-token --push-token --config --timeout --json --code --reason' ;;
                drain) words='-h --help --admin --push --admin-token --push-token --config --timeout --json --off --worker --wait' ;;
                reload) words='-h --help --admin --push --admin-token --push-token --config --timeout --json --wait' ;;
                profile) words='-h --help --admin --push --admin-token --push-token --config --timeout --json --worker --kind --seconds --output' ;;
                errors) words='-h --help --admin --push --admin-token --push-token --config --timeout --json' ;;
                *) words='status clients client tail push close drain reload profile errors -h --help --admin --push --admin-token --push-token --config --timeout --json --version' ;;
            esac ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}

complete -F _ws2api_ctl ws2api-ctl
