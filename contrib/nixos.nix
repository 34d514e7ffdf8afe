# NixOS module for nbd. In configuration.nix:
#
#   imports = [ ./nbd/contrib/nixos.nix ];
#   services.nbd = { enable = true; package = /* what has bin/nbd */; };
{ config, lib, pkgs, ... }:
let
  cfg = config.services.nbd;
  file = (pkgs.formats.toml { }).generate "nbd.toml" ({
    sandbox-shell = "${pkgs.pkgsStatic.busybox}/bin/busybox";
    qemu = "${pkgs.qemu_kvm}/bin/qemu-system-${pkgs.stdenv.hostPlatform.qemuArch}";
  } // cfg.settings);
in
{
  options.services.nbd = {
    enable = lib.mkEnableOption "nbd, a remote Nix builder that strangers can share";
    package = lib.mkOption {
      type = lib.types.package;
      description = "The nbd to run.";
    };
    openFirewall = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = "Whether to open the SSH port of nbd.";
    };
    port = lib.mkOption {
      type = lib.types.port;
      default = 2222;
      description = "Port for SSH.";
    };
    settings = lib.mkOption {
      type = (pkgs.formats.toml { }).type;
      default = { };
      example = { max-guests = 4; default-mem = 4096; };
      description = "What `nbd serve --help` lists, by the same names.";
    };
  };
  config = lib.mkIf cfg.enable {
    environment.systemPackages = [ cfg.package ];
    networking.firewall.allowedTCPPorts = lib.mkIf cfg.openFirewall [ cfg.port ];
    systemd.services.nbd = {
      description = "Remote Nix builder";
      wantedBy = [ "multi-user.target" ];
      after = [ "network.target" ];
      serviceConfig = {
        Type = "notify";
        ExecStart = "${cfg.package}/bin/nbd serve --config ${file} --ssh-listen :${toString cfg.port}";
        StateDirectory = "nbd";
        StateDirectoryMode = "0755";
        Delegate = true;
        KillMode = "mixed";
        TimeoutStopSec = "15min";
        Restart = "on-failure";
        LimitNOFILE = 1048576;
        ProtectSystem = "strict";
        ProtectHome = "read-only";
        PrivateTmp = true;
      };
    };
  };
}
