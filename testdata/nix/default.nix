# Derivations for the scripts of testdata/script. `seed` makes their paths new.
{ seed ? "", script ? "", extra ? { }, n ? "3" }:
let
  bb = builtins.path { path = builtins.getEnv "NBD_TEST_TOOLS"; name = "bb"; };
  run = name: attrs: script: derivation ({
    inherit name seed;
    system = "x86_64-linux";
    builder = "${bb}/busybox";
    PATH = "${bb}";
    args = [ "sh" "-euc" script ];
  } // attrs);
  random = "busybox head -c16 /dev/urandom | busybox od -An -tx1";
  # The one of `n` derivations with number i; each needs the one before.
  chain = i: run "chain-${toString i}"
    (if i == 0 then { } else { before = chain (i - 1); })
    ''echo ${toString i} ''${before:-} > $out'';
in
{
  # What --argstr script says.
  any = run "any" extra script;
  # Differs each time that it really runs.
  random = run "random" { } "echo running; ${random} > $out";
  # Copies what its input `dep` happens to hold; through one more path, and with
  # dep as no direct input.
  dep = run "dep" { } "${random} > $out";
  top = run "top" { dep = run "dep" { } "${random} > $out"; } "busybox cat $dep > $out";
  mid = run "mid" { dep = run "dep" { } "${random} > $out"; } "echo $dep > $out";
  over = run "over" { mid = run "mid" { dep = run "dep" { } "${random} > $out"; } "echo $dep > $out"; } "busybox cat $(busybox cat $mid) > $out";
  # Says which run it is, and fails.
  marked = run "marked" { } "echo marker-$(${random})-of-run; exit 3";
  # n derivations that each need the one before.
  chain = chain (builtins.fromJSON n - 1);
  # n derivations that need nothing of each other, and one that needs them all.
  fan = run "fan"
    { parts = builtins.genList (i: run "part-${toString i}" { } "echo ${toString i} > $out") (builtins.fromJSON n); }
    "busybox cat $parts > $out";
  # The same, each with contents of its own each time that it really runs.
  crew = run "crew"
    { parts = builtins.genList (i: run "member-${toString i}" { } "${random} > $out") (builtins.fromJSON n); }
    "echo $parts > $out; ${random} >> $out";
  outputs = run "outputs" { outputs = [ "out" "dev" "doc" ]; } ''
    busybox mkdir $out $dev
    echo $dev > $out/needs
    echo doc > $doc
  '';
  fixed = run "fixed"
    { outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "7d96935c3dcb2aa41cb73ff95b2bc34aa8db9518f70ae9624b01444a7edf2305"; }
    "busybox printf 'fixed contents\\n' > $out";
  wrong = run "wrong"
    { outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "0000000000000000000000000000000000000000000000000000000000000000"; }
    "echo ${seed} > $out";
  addressed = run "addressed" { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; }
    "busybox mkdir $out; echo $out > $out/self";
  elsewhere = run "elsewhere" { system = "riscv64-linux"; } "echo > $out";
  featured = run "featured" { requiredSystemFeatures = [ "gone" ]; } "echo > $out";
}
