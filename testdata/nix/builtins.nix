# Derivations for the builders that Nix has inside itself, from files below dir:
# packages a and b, and an archive channel.tar.xz; and for files below url.
{ dir, url ? "", seed ? "" }:
let
  path = name: builtins.path { path = dir + "/${name}"; inherit name; };
  builtin = builder: attrs: derivation ({ inherit seed; system = "builtin"; builder = "builtin:${builder}"; } // attrs);
in
{
  environment = builtin "buildenv" {
    name = "environment";
    manifest = builtins.toFile "env-manifest.nix" "[]";
    derivations = [ "true" "5" "1" (path "a") "true" "6" "1" (path "b") ];
  };
  channel = builtin "unpack-channel" { name = "channel"; channelName = "nixos"; src = path "channel.tar.xz"; system = "x86_64-linux"; };
  # From a web server.
  fetched = builtin "fetchurl" {
    name = "fetched";
    url = "${url}/b/bin/both";
    outputHashAlgo = "sha256";
    outputHash = builtins.hashString "sha256" "b\n";
  };
  # A folder, with a hash that is wrong.
  restored = builtin "fetchurl" {
    name = "restored";
    url = "${url}/b.nar.xz";
    unpack = true;
    outputHashMode = "recursive";
    outputHashAlgo = "sha256";
    outputHash = "0000000000000000000000000000000000000000000000000000";
  };
}
