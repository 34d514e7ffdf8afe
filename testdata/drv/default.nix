# Derivations of every kind, all of which build with /bin/sh alone.
let
  mk = name: script: attrs: derivation ({
    inherit name;
    system = "x86_64-linux";
    builder = "/bin/sh";
    args = [ "-c" script ];
  } // attrs);
  ca = { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
  fixed = algo: hash: { outputHashMode = "flat"; outputHashAlgo = algo; outputHash = hash; };
  tree = algo: hash: { outputHashMode = "recursive"; outputHashAlgo = algo; outputHash = hash; };
  hello = "echo hello > $out";
in rec {
  simple = mk "simple" hello { };
  noArguments = derivation { name = "no-arguments"; system = "x86_64-linux"; builder = simple; };
  multi = mk "multi" "echo o > $out; echo $out > $dev; echo d > $doc" { outputs = [ "out" "dev" "doc" ]; };
  noOut = mk "no-out" "echo o > $lib; echo d > $bin" { outputs = [ "lib" "bin" ]; };
  dependent = mk "dependent" "echo ${simple} ${multi.dev} ${noOut.bin} > $out" { };
  sources = mk "sources" "echo ${./source} ${text} > $out" { };
  text = builtins.toFile "text" "refers to ${builtins.toFile "plain" "plain"}\n";
  odd = mk "odd+-._=" hello {
    tab = "a\tb"; newline = "a\nb"; return = "a\rb"; quote = "a\"b"; backslash = "a\\b\\n";
    dollar = "\${x}"; utf8 = "日本 ümläut"; empty = ""; control = builtins.fromJSON ''"\u0001\u007f"'';
    "a\"key" = "x"; list = [ "a" "b" simple ]; yes = true; no = false; null = null; number = 3;
  };
  structured = mk "structured" "echo hello > /build/x; . ./.attrs.sh; echo hello > \${outputs[out]}" {
    __structuredAttrs = true;
    nested = { a = [ 1 "two" { b = null; } ]; inherit simple; };
    outputs = [ "out" ];
  };

  # echo hello | sha256sum, …; and what nix-hash --type sha1 says of that file
  fixedFlat = mk "fixed-flat" hello (fixed "sha256" "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03");
  fixedMd5 = mk "fixed-md5" hello (fixed "md5" "b1946ac92492d2347c6235b4d2611184");
  fixedSha1 = mk "fixed-sha1" hello (fixed "sha1" "f572d396fae9206628714fb2ce00f72e94f2258f");
  fixedSha512 = mk "fixed-sha512" hello (fixed "sha512" "e7c22b994c59d9cf2b48e549b1e24666636045930d3da7c1acb299d1c3b7f931f94aae41edda2c2b207a36e10f8bcb8d45223e54878f5b316e7ce3b6bc019629");
  fixedTree = mk "fixed-tree" hello (tree "sha256" "04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw");
  fixedTreeSha1 = mk "fixed-tree-sha1" hello (tree "sha1" "0deb52c2735eb38d360f976b7b3823c4ad05cce7");

  # Two ways to the same fixed output have equal hashes modulo, and so have
  # what uses one and what uses the other.
  again = mk "fixed-flat" "printf 'hello\\n' > $out" (fixed "sha256" "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03");
  both = mk "both" "cat ${fixedFlat} ${again} > $out" { };
  left = mk "side" "echo $src > $out; echo $out > $dev" { outputs = [ "out" "dev" ]; src = fixedFlat; };
  right = mk "side" "echo $src > $out; echo $out > $dev" { outputs = [ "out" "dev" ]; src = again; };
  merged = mk "merged" "echo ${left} ${right.dev} > $out" { };

  floating = mk "floating" "echo x > $out" ca;
  floatingSelf = mk "floating-self" "echo scratch $out; echo \"a $out b $out\" > $out" ca;
  floatingMulti = mk "floating-multi" "mkdir $out; echo $dev > $out/dev; echo $dev > $dev" (ca // { outputs = [ "out" "dev" ]; });
  floatingFlat = mk "floating-flat" "echo x > $out" { __contentAddressed = true; outputHashMode = "flat"; outputHashAlgo = "sha1"; };
  floatingOn = mk "floating-on" "echo ${floating} ${floatingMulti.dev} > $out" ca;
  deferred = mk "deferred" "echo ${floating} > $out; echo ${simple} > $dev" { outputs = [ "out" "dev" ]; };
  deferredTwice = mk "deferred-twice" "echo ${deferred.dev} ${floatingSelf} > $out" { };
  impure = mk "impure" "echo x > $out" { __impure = true; };
  onImpure = mk "on-impure" "echo ${impure} > $out" { __impure = true; };
}
