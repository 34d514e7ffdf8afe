# Two outputs that are not content-addressed: top refers to dep.
let
  bb = builtins.path { path = ./bb; name = "bb"; };
  make = name: attrs: script: derivation ({
    inherit name;
    system = "x86_64-linux";
    builder = "${bb}/busybox";
    args = [ "sh" "-c" script ];
    PATH = bb;
  } // attrs);
  dep = make "dep" { } ''
    busybox mkdir $out
    busybox seq 1 300 > $out/numbers
    busybox ln -s numbers $out/link
  '';
in
make "top" { inherit dep; } "echo $dep > $out"
