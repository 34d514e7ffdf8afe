# Derivations for the builders that Nix has inside itself, from files below dir:
# packages a and b, and an archive channel.tar.xz.
{ dir, seed ? "" }:
let
  path = name: builtins.path { path = dir + "/${name}"; inherit name; };
  builtin = builder: attrs: derivation ({ inherit seed; system = "builtin"; builder = "builtin:${builder}"; } // attrs);
  environment = name: second: builtin "buildenv" {
    inherit name;
    manifest = builtins.toFile "env-manifest.nix" "[]";
    derivations = [ "true" "5" "1" (path "a") "true" second "1" (path "b") ];
  };
in
{
  environment = environment "environment" "6";
  # Both packages have a file bin/both of one priority.
  conflict = environment "conflict" "5";
  channel = builtin "unpack-channel" { name = "channel"; channelName = "nixos"; src = path "channel.tar.xz"; system = "x86_64-linux"; };
  # A file of an input, so that no network is needed.
  fetched = builtin "fetchurl" {
    name = "fetched";
    url = "file://${path "a"}/bin/both";
    executable = true;
    outputHashMode = "recursive";
    outputHashAlgo = "sha256";
    outputHash = "0000000000000000000000000000000000000000000000000000";
  };
}
