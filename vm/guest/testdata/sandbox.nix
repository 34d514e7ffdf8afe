# Prints what a builder sees in Nix's sandbox; see README.md. busybox is a
# directory with bin/busybox, static, and a link to it for each of its programs.
{ busybox, system ? "x86_64-linux" }:
let bb = builtins.path { name = "busybox"; path = busybox; };
in derivation {
  name = "test";
  inherit system;
  builder = "${bb}/bin/busybox";
  args = [ "sh" "-e" "-c" (builtins.readFile ./sandbox.sh) ];
  PATH = "${bb}/bin";
}
