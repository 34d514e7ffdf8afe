// Nbd is a remote Nix builder: builds in guests of their own, for accounts that
// do not trust each other. See README.md, and ARCHITECTURE.md for the code.
//
// This file holds the commands and nothing that they do: it turns flags,
// environment and the configuration file into Configs, and joins the packages.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"nbd/nixproto"
	"nbd/server"
	"nbd/server/adminapi"
	"nbd/server/admincli"
	"nbd/server/config"
	"nbd/server/upstream"
	"nbd/store"
	"nbd/vm"
	"nbd/vm/fault"
	"nbd/vm/guest"
)

func main() {
	guest.Enter() // the same program is the init of its guests
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run runs one command and returns its exit status: 1 for an error, 2 for a
// command line that cannot be understood.
func run(args []string, stdout, stderr io.Writer) int {
	cmd := rootCommand()
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	err := cmd.ExecuteContext(context.Background())
	if err == nil {
		return 0
	}
	if hint := hintOf(err); hint == "" {
		fmt.Fprintln(stderr, "nbd: error:", err)
	} else { // which some errors have in their own text, too
		fmt.Fprintln(stderr, "nbd: error:", strings.ReplaceAll(err.Error(), " ("+hint+")", ""))
		fmt.Fprintln(stderr, "nbd: hint:", hint)
	}
	var usage admincli.UsageError
	if errors.As(err, &usage) {
		return 2
	}
	return 1
}

// hintOf returns the way out that an error carries, if it does.
func hintOf(err error) string {
	var hint *adminapi.HintError
	var missing *vm.MissingError
	var usage admincli.UsageError
	switch {
	case errors.As(err, &hint):
		return hint.Hint
	case errors.As(err, &missing):
		return missing.Hint
	case errors.Is(err, store.ErrLocked):
		return "stop that one, or give this one a directory of its own with --state"
	case errors.Is(err, store.ErrTooNew):
		return "start the newer nbd, or name another directory with --state"
	case errors.Is(err, store.ErrDamaged):
		return "put the state directory back from a backup, or name another one with --state: accounts and paths are in its nbd.db"
	case errors.Is(err, syscall.ENOTDIR):
		return "name a directory with --state; it is made if it is not there"
	case errors.As(err, &usage):
		return "see `nbd help`, or --help after any command"
	}
	return ""
}

func rootCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "nbd",
		Short: "A remote Nix builder that strangers can share",
		Long: `nbd is a remote Nix builder for the owner of one machine. To a Nix client it is
an entry of nix.buildMachines; behind that every build runs in a QEMU guest of
its own, and every account has a view of the store of its own.

  nbd serve                                       start the builder
  nbd admin account add NAME --ssh-key FILE       let somebody in
  nbd setup                                       print what a client needs
  nbd doctor                                      find out what is wrong`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs, // cobra's own refusal is no usageError
		RunE:          admincli.NeedsCommand,
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return admincli.UsageError{Err: err} })
	cmd.AddCommand(serveCommand(), adminCommand(), kernelCommand(), setupCommand(), doctorCommand(), versionCommand())
	return cmd
}

// The server.

func serveCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "serve", Short: "Run the builder", Args: admincli.ExactArgs(),
		Long: `Run the builder until SIGTERM, which lets running builds finish for a while; a
second one ends at once. Every setting below may also come from the environment
(NBD_SSH_LISTEN for --ssh-listen) or from a TOML file (ssh-listen = "…"); a flag
wins over the environment, that over the file.`}
	cfg := config.New(cmd, config.Serve, config.Guest)
	cmd.Flags().String("fault", "", "what breaks builds on purpose (package vm/fault)")
	cmd.Flag("fault").Hidden = true
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := cfg.Load(); err != nil {
			return err
		}
		log, err := newLogger(cfg, cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		// Ingest allocates little and holds less: collecting less often is
		// worth a fifth of its CPU time.
		debug.SetGCPercent(800)
		debug.SetMemoryLimit(1 << 30)
		for _, name := range config.UnknownVariables(os.Environ()) {
			log.Warn("environment names no setting of the server; `nbd serve --help` lists them", "variable", name)
		}
		return serve(cmd.Context(), cfg, log)
	}
	return cmd
}

// newLogger returns the server's logger.
func newLogger(c *config.Config, w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Text("log-level"))); err != nil {
		return nil, fmt.Errorf("log-level: %q is none of debug, info, warn and error", c.Text("log-level"))
	}
	opts := &slog.HandlerOptions{Level: level}
	switch format := c.Text("log-format"); format {
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	default:
		return nil, fmt.Errorf("log-format: %q is neither text nor json", format)
	}
}

// guestConfig turns the guest settings into the Config of package vm.
func guestConfig(c *config.Config, log *slog.Logger) vm.Config {
	return vm.Config{StateDir: c.Text("state"), QEMU: c.Text("qemu"), Kernel: c.Text("kernel"), Systems: c.List("systems"), KVMInBuilds: c.Text("kvm-in-builds"),
		Accel: c.Text("accel"), Busybox: c.Text("sandbox-shell"), Certificates: c.Text("certificates"), ColdBoot: config.Get[bool](c, "cold-boot"), Logger: log}
}

// serve joins the packages and runs them until a signal ends them.
func serve(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	state := cfg.Text("state")
	guests := guestConfig(cfg, log)
	name := cfg.Text("server-name")
	if name == "" {
		host, err := os.Hostname()
		if err != nil {
			return err
		}
		name = host
	}
	publicKeys, err := cfg.PublicKeys()
	if err != nil {
		return err
	}
	storeConfig := store.Config{ServerName: name, MinFree: cmp.Or(int64(cfg.Number("min-free"))<<20, -1),
		KeepLogs: config.Get[time.Duration](cfg, "keep-logs"), PublicKeys: publicKeys, Logger: log}
	builds := server.BuildsConfig{CPUs: cfg.Number("default-cpu"), MemoryMiB: cfg.Number("default-mem"),
		MaxMemoryMiB: cfg.Number("max-mem"), ScratchMiB: cfg.Number("scratch"), MaxScratchMiB: cfg.Number("max-scratch"), Logger: log, Generation: cfg.Number("sandbox-generation"),
		Room: server.Room{Guests: cfg.Number("max-guests"), MemoryMiB: cfg.Number("memory")}}
	front := server.Config{Version: server.Version(), Logger: log, TempDir: filepath.Join(state, "tmp"), Ciphers: cfg.List("ciphers"), MaxUnauthenticated: cfg.Number("max-unauthenticated"),
		Settings: cfg.SystemSettings(), TrustedKeys: publicKeys,
		HandshakeTimeout: config.Get[time.Duration](cfg, "handshake-timeout"), KeepAlive: config.Get[time.Duration](cfg, "keep-alive")}
	if builds.Network, err = cfg.Network(); err != nil {
		return err
	}
	grace := config.Get[time.Duration](cfg, "drain-timeout")
	listener, err := net.Listen("tcp", cfg.Text("ssh-listen"))
	if err != nil {
		return &adminapi.HintError{Err: err, Hint: "choose another address with --ssh-listen"}
	}
	defer listener.Close()
	if err := os.MkdirAll(state, 0o755); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	st, err := store.Open(state, storeConfig)
	if err != nil {
		return err
	}
	defer closeLogged(log, "the store", st)
	guests.Blobs = blobs{st}
	if guests.Faults, err = fault.Parse(cfg.Text("fault")); err != nil {
		return fmt.Errorf("fault: %w", err)
	}
	guests.Room = func() error { return st.CheckRoom(0) }
	runner, err := vm.New(guests)
	if err != nil {
		return err
	}
	defer closeLogged(log, "the guests", runner)
	caches := upstream.New(upstream.Config{UserAgent: "nbd/" + server.Version(), Logger: log})
	defer caches.Close()
	builds.Store, builds.Runner = st, runner
	builds.Machine = server.NewMachine(state, cfg.Number("min-free"), runner.Load, log)
	front.Store, front.Substituter = st, server.NewSubstituter(st, caches, log)
	builds.Substituter = front.Substituter
	d, err := server.NewDaemon(ctx, server.DaemonConfig{State: state, Server: front, Builds: builds, Guests: runner, Logger: log})
	if err != nil {
		return err
	}
	defer closeLogged(log, "the server", d)
	return serveUntilSignal(d, listener, grace, log)
}

// closeLogged closes a part of the server at its end.
func closeLogged(log *slog.Logger, what string, c io.Closer) {
	if err := c.Close(); err != nil {
		log.Error("cannot close "+what, "err", err)
	}
}

// serveUntilSignal serves; the first signal drains, the second one ends.
func serveUntilSignal(d *server.Daemon, l net.Listener, grace time.Duration, log *slog.Logger) error {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	ended := make(chan error, 1)
	go func() { ended <- d.Serve(l) }()
	log.Info("nbd is ready", "version", server.Version(), "ssh", l.Addr().String(), "state", d.State())
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.Warn("cannot tell systemd", "err", err)
	}
	select {
	case err := <-ended:
		return err
	case s := <-signals:
		log.Info("draining: no new builds, running ones may finish", "signal", s.String(), "grace", grace)
	}
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	go func() {
		<-signals
		log.Warn("second signal: ending at once")
		cancel()
	}()
	if err := d.Drain(ctx); err != nil {
		log.Warn("ending builds that still run", "err", err)
	}
	return nil
}

// blobs lets guests read the store's blobs.
type blobs struct{ *store.Store }

// Open implements vm.Blobs.
func (b blobs) Open(ctx context.Context, h nixproto.Hash) (vm.Blob, error) {
	broken := fault.From(ctx)
	if err := broken.Open(); err != nil {
		return nil, err
	}
	blob, err := b.OpenBlob(ctx, h)
	if err != nil {
		return nil, err
	}
	if read := broken.Read(); read != nil {
		blob.Inject(read)
	}
	return blob, nil
}

// adminCommand is `nbd admin`, with --state from the environment, too.
func adminCommand() *cobra.Command {
	cmd := admincli.Command(config.DefaultState())
	cfg := config.Of(cmd.PersistentFlags())
	cmd.PersistentPreRunE = func(*cobra.Command, []string) error { return cfg.Load() }
	return cmd
}

// Commands that need no server.

func kernelCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "kernel", Short: "Kernels for guests: import, list", RunE: admincli.NeedsCommand}
	cmd.PersistentFlags().String("state", config.DefaultState(), "directory of the server's state")
	cfg := config.Of(cmd.PersistentFlags())
	cmd.PersistentPreRunE = func(*cobra.Command, []string) error { return cfg.Load() }
	cmd.AddCommand(
		&cobra.Command{Use: "import FILE|DIR", Args: admincli.ExactArgs("FILE|DIR"),
			Short: "Keep a kernel, or a static busybox, from a package (.deb, .rpm) or from a folder with vmlinuz and its modules",
			RunE: func(cmd *cobra.Command, args []string) error {
				got, err := vm.Import(cfg.Text("state"), args[0])
				if err != nil {
					return importError(err)
				}
				fmt.Fprintln(cmd.OutOrStdout(), "imported", got)
				return nil
			}},
		&cobra.Command{Use: "list", Args: admincli.ExactArgs(), Short: "List kernels that guests could run, of each architecture the one to be used first",
			RunE: func(cmd *cobra.Command, _ []string) error {
				list, err := vm.Kernels(cfg.Text("state"))
				if err != nil {
					return err
				}
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
				for _, k := range list {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", k.Name, k.Arch, map[bool]string{true: "imported", false: "host"}[k.Imported], k.Image)
				}
				return w.Flush()
			}})
	return cmd
}

// importError adds the way out to an error about what was imported. The host's
// own troubles, such as a full disk, speak for themselves.
func importError(err error) error {
	var number syscall.Errno
	if errors.As(err, &number) && number != syscall.ENOENT {
		return err
	}
	return &adminapi.HintError{Err: err, Hint: "name a distribution's kernel package (Debian's linux-image-…-amd64.deb or …-arm64.deb, Fedora's kernel-core-….rpm), one with a static busybox (Debian's busybox-static), or a folder with vmlinuz and its modules"}
}

func setupCommand() *cobra.Command {
	var host, port, kind string
	cmd := &cobra.Command{Use: "setup", Short: "Print the configuration that a client needs", Args: admincli.ExactArgs()}
	cfg := config.New(cmd)
	cmd.Flags().StringVar(&host, "host", "", "name or address by which clients reach this machine")
	cmd.Flags().StringVar(&port, "port", "", "port by which they do (default: the one the server listens on)")
	cmd.Flags().StringVar(&kind, "for", "nix.conf", strings.Join(adminapi.SetupKinds, ", "))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := cfg.Load(); err != nil {
			return err
		}
		text, err := adminapi.NewClient(cfg.Text("state")).Setup(cmd.Context(), host, port, kind)
		if err == nil {
			fmt.Fprint(cmd.OutOrStdout(), text)
		}
		return err
	}
	return cmd
}

func doctorCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "doctor", Short: "Prove each part that a build needs, boot a guest, say how to mend what is wrong", Args: admincli.ExactArgs()}
	cfg := config.New(cmd, config.Guest)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := cfg.Load(); err != nil {
			return err
		}
		return server.Doctor(cmd.Context(), guestConfig(cfg, slog.New(slog.DiscardHandler)), cmd.OutOrStdout())
	}
	return cmd
}

func versionCommand() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Print the version", Args: admincli.ExactArgs(),
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), "nbd", server.Version()) }}
}
