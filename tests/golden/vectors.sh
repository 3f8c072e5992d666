#!/bin/bash
# Makes the values of docs/vectors.md with printf, perl, xxd and sha256sum alone: nothing of this project, no Python.
set -euo pipefail
h() { sha256sum | cut -c1-64; }
pattern() { perl -e '$s=join("",map chr, 0..250); $n=$ARGV[0]; print substr($s x (1+int($n/251)),0,$n)' "$1"; }
digest() { # of standard input
  local file size leaves="" i=0
  file=$(mktemp); cat > "$file"; size=$(stat -c %s "$file")
  while :; do
    leaves="$leaves$( (printf '\0'; tail -c +$((i * 4194304 + 1)) "$file" | head -c 4194304) | h)"
    i=$((i + 1)); [ $((i * 4194304)) -ge "$size" ] && break
  done
  (printf '\1'; perl -e 'print pack("Q<", $ARGV[0])' "$size"; printf %s "$leaves" | xxd -r -p) | h
  rm "$file"
}
hex() { printf %s "$1" | xxd -r -p | digest; }
root() { (printf 'gora-serve/base-manifest/1\0'; cat) | h; }

for bytes in "" 00 00002040 0100 ffffffffffffffff 803f0080 38b87f 003c007c; do echo "digest ${bytes:-none} $(hex "$bytes")"; done
for size in 4194303 4194304 4194305 8388608 12582917; do echo "digest of $size bytes $(pattern $size | digest)"; done
none=$(hex ""); f32=$(hex 00002040); bf16=$(hex 803f0080); bool=$(hex 0100)
echo "no tensor gb1:sha256:$(printf '{}' | root)"
echo "scalar gb1:sha256:$(printf '{"s":{"dtype":"F32","sha256":"%s","shape":[]}}' "$f32" | root)"
echo "empty gb1:sha256:$(printf '{"e":{"dtype":"BF16","sha256":"%s","shape":[0,3]}}' "$none" | root)"
echo "two gb1:sha256:$(printf '{"a":{"dtype":"BF16","sha256":"%s","shape":[2]},"b":{"dtype":"BOOL","sha256":"%s","shape":[2]}}' "$bf16" "$bool" | root)"
echo "names gb1:sha256:$(printf '{"\xc3\xa4":{"dtype":"F32","sha256":"%s","shape":[]},"\xf0\x9f\x98\x80":{"dtype":"F32","sha256":"%s","shape":[]},"\xef\xac\xb3":{"dtype":"F32","sha256":"%s","shape":[]}}' "$f32" "$f32" "$f32" | root)"
echo "tied gb1:sha256:$(printf '{"model.embed_tokens.weight":{"dtype":"BF16","sha256":"%s","shape":[2,1]}}' "$bf16" | root)"
echo "config gc1:sha256:$( (printf 'gora-serve/config/1\0'; printf '{"hidden_size":4,"rms_norm_eps":{"__float__":"0x1.4f8b588e368f1p-17"},"rope_theta":10000}') | h)"
echo "tokenizer gt1:sha256:$( (printf 'gora-serve/tokenizer/1\0'; printf '{"tokenizer.json":"%s"}' "$(printf '{}' | h)") | h)"
