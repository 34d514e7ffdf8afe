# Builders that print what they see, see testdata/world; for world.txtar. DIR has
# the program for each machine, as DIR/amd64/world and DIR/386/world.
{ dir, seed }:
let
  bb = builtins.path { path = builtins.getEnv "NBD_TEST_TOOLS"; name = "bb"; };
  program = arch: builtins.path { path = "${dir}/${arch}"; name = "world"; };
  # The program's runtime changes some of what it would print.
  script = ''
    "$1"/busybox cat /proc/self/limits > limits
    "$1"/busybox cat /proc/self/status > status
    for n in 0 1 2 3 4 5 6 7 8 9; do
      [ ! -L /proc/$$/fd/$n ] || echo $n $("$1"/busybox readlink /proc/$$/fd/$n)
    done > fds
    "$2"/world
    echo ${seed} > "$3"
  '';
  look = name: arch: attrs: derivation ({
    inherit name;
    system = "x86_64-linux";
    builder = "${bb}/busybox";
    args = [ "sh" "-euc" script "world" bb (program arch) (builtins.placeholder "out") ];
  } // attrs);
in
{
  plain = look "plain" "amd64" { passAsFile = [ "long" ]; long = "more"; };
  i686 = look "i686" "386" { system = "i686-linux"; };
  structured = look "structured" "amd64" {
    __structuredAttrs = true;
    list = [ "a" "b c" ];
    object = { number = 1; yes = true; };
  };
  fixed = look "fixed" "amd64" {
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = builtins.hashString "sha256" "${seed}\n";
    impureEnvVars = [ "set_nowhere" ];
  };
}
