# nbd as a Nix package; vendorHash changes with go.sum.
{ lib, buildGoModule }:
buildGoModule {
  pname = "nbd";
  version = "0";
  src = lib.cleanSource ../.;
  vendorHash = lib.fakeHash;
  env.CGO_ENABLED = 0;
  # The tests boot guests; contrib/test runs them.
  doCheck = false;
  meta.description = "Remote Nix builder that strangers can share";
}
