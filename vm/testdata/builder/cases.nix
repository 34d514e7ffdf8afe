# Derivations whose builders keep what Nix gave them; see README.md. busybox is
# a directory with bin/busybox, static, and a link to it for each program.
{ busybox }:
let
  bb = builtins.path { name = "busybox"; path = busybox; };
  keep = ''
    mkdir $out
    cat /proc/1/environ > $out/environ
    cat /proc/1/cmdline > $out/cmdline
    cp -r /build $out/files
  '';
  mk = name: script: attrs: derivation ({
    inherit name;
    system = "x86_64-linux";
    builder = "${bb}/bin/busybox";
    args = [ "sh" "-e" "-c" script (builtins.placeholder "out") ];
    PATH = "${bb}/bin";
  } // attrs);
  rep = n: s: if n == 0 then s else rep (n - 1) (s + s);
  leaf = mk "leaf" "echo ${bb} > $out" { };
  tree = mk "tree" "mkdir $out; echo $leaf > $out/leaf; echo $out > $out/self" { inherit leaf; };
in {
  plain = mk "plain" keep {
    text = "a\nb \"c\" 'd' $e \\ ü ${builtins.placeholder "out"}";
    passed = rep 10 "0123456789"; empty = ""; passedPath = "overridden"; zeta = "z";
    passAsFile = [ "passed" "zeta" "notThere" ];
    HOME = "/overridden"; TMPDIR = "/not-overridden"; NIX_LOG_FD = "9"; TERM = "dumb"; NIX_BUILD_CORES = "77";
    TRUE = true; FALSE = false; NULL = null; number = 42; list = [ "a" 1 [ "b" ] ];
  };
  outputs = mk "outputs" (keep + "touch $dev $lib") { outputs = [ "out" "lib" "dev" ]; };
  graph = mk "graph" keep { exportReferencesGraph = [ "zwei" tree "eins" leaf "sub" "${tree}/leaf" ]; };
  graph-drv = mk "graph-drv" keep { exportReferencesGraph = [ "closure" tree.drvPath ]; };
  structured = mk "structured" ("export PATH=${bb}/bin; out=$1\n" + keep) {
    __structuredAttrs = true;
    args = [ "sh" "-e" "-c" ("export PATH=${bb}/bin; out=$0\n" + keep) (builtins.placeholder "out") ];
    outputs = [ "out" ];
    exportReferencesGraph = { closure = [ tree ]; nested = [ [ leaf "${tree}/leaf" ] ]; one = leaf; };
    passAsFile = [ "string" ];
    string = "quo'te \"double\" back\\slash\nnewline\ttab\rreturn\bü☃𝄞"; control = "";
    empty = ""; yes = true; no = false; nothing = null;
    i0 = 0; i1 = -1; i2 = 2147483647; i3 = 2147483648; i4 = -2147483649; i5 = 9007199254740993; i6 = 4294967301;
    f0 = 0.0; f1 = 1.5; f2 = 1.0; f3 = 1.0e15; f4 = 1.0e14; f5 = 123456789012345.0; f6 = 1.0e16; f7 = 1.0e300; f8 = 1.0e-4; f9 = 1.0e-5;
    fa = 0.1; fb = 16777216.5; fc = -2.0; fd = 3.0e9; ff = 1.7976931348623157e308; fg = 0.30000000000000004;
    fh = 100.25; fi = -1.0e-7; fk = 9007199254740993.0; fl = 4.35; fm = 1.0e23;
    listOfInts = [ 1 2 3 ]; listOfMixed = [ "a b" 1 true false null "it's" ]; listOfFloats = [ 1.5 ]; listOfLists = [ [ 1 ] ]; emptyList = [ ];
    set = { a = 1; "b c" = "d'e"; f = null; g = true; }; setOfSets = { a = { b = 1; }; }; emptySet = { };
    "not a name" = 1; "1st" = 1; _ok1 = 1; "dash-ed" = 1;
    ref = "${leaf}"; self = builtins.placeholder "out";
  };
  floating = mk "floating" keep {
    __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
    outputs = [ "out" "dev" ]; args = [ "sh" "-e" "-c" (keep + "touch $dev") ];
    self = builtins.placeholder "dev";
  };
  # A fixed output cannot hold what was given: it is in the log.
  fixed = mk "fixed" "tr '\\000' '\\n' < /proc/1/environ; printf x > $out" {
    outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = builtins.hashString "sha256" "x";
    impureEnvVars = [ "http_proxy" "NBD_NOT_SET" "NIX_STORE" ];
  };
}
