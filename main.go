// Nbd is a remote Nix builder: builds in guests of their own, for accounts that
// do not trust each other. See README.md, and ARCHITECTURE.md for the code.
//
// This file holds the commands and nothing that they do: it turns flags,
// environment and the configuration file into Configs, and joins the packages.
package main

import (
	"cmp"
	"context"
	"encoding/json"
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
	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"nbd/nixproto"
	"nbd/server"
	"nbd/store"
	"nbd/vm"
	"nbd/vm/guest"
	"nbd/vm/link"
)

func main() {
	// The same program is the init of its guests, and what enters the sandbox
	// there.
	switch {
	case os.Getpid() == 1 && os.Args[0] == "/init":
		guest.Main()
	case os.Args[0] == link.SandboxArg0:
		guest.Sandbox()
	}
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
	var usage usageError
	if errors.As(err, &usage) {
		return 2
	}
	return 1
}

// A usageError is a command line that cannot be understood.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// hintOf returns the way out that an error carries, if it does.
func hintOf(err error) string {
	var hint *server.HintError
	var missing *vm.MissingError
	var usage usageError
	switch {
	case errors.As(err, &hint):
		return hint.Hint
	case errors.As(err, &missing):
		return missing.Hint
	case errors.Is(err, store.ErrLocked):
		return "stop that one, or give this one a directory of its own with --state"
	case errors.Is(err, store.ErrTooNew):
		return "start the newer nbd, or name another directory with --state"
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
		RunE:          needsCommand,
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	cmd.AddCommand(serveCommand(), adminCommand(), kernelCommand(), setupCommand(), doctorCommand(), versionCommand())
	return cmd
}

// Settings: one table of all that can be configured. A flag wins over the
// environment (NBD_ and the name in upper case, _ for -), that over the file
// (TOML, the same names).

// A setting is one row of the table.
type setting struct {
	name  string
	value any // the default, of the setting's type
	usage string
}

var serveSettings = []setting{
	{"ssh-listen", ":2222", "address for SSH"},
	{"server-name", "", "first half of the names of signing keys (default: the host's name)"},
	{"ciphers", "", "SSH ciphers to offer, commas between them (default: those that suit the processor)"},
	{"max-connections", uint(2048), "connections that one account may have open at once"},
	{"max-unauthenticated", uint(64), "connections that may be in their handshake at once"},
	{"handshake-timeout", 20 * time.Second, "time from connection to authentication"},
	{"keep-alive", 20 * time.Second, "after how long a silent client is asked for a sign of life"},
	{"max-guests", uint(0), "builds at once (default: as many as CPUs and memory allow)"},
	{"memory", uint(0), "MiB of memory for all guests (default: three quarters of the host's)"},
	{"default-cpu", uint(2), "CPUs of a guest"},
	{"default-mem", uint(2048), "MiB of memory that a build is given at first"},
	{"max-mem", uint(0), "MiB up to which a build that ran out is given more (default: what --memory allows)"},
	{"scratch", uint(51200), "MiB of disk that a build may write, rounded up to a power of two GiB"},
	{"max-log-size", uint(1 << 30), "bytes of log after which a build is ended; 0 for no limit"},
	{"min-free", uint(1024), "MiB of disk that uploads, outputs and logs leave free"},
	{"drain-timeout", 10 * time.Minute, "how long running builds may go on after SIGTERM"},
	{"log-level", "info", "debug, info, warn or error"},
	{"log-format", "text", "text or json"},
}

// guestSettings are what `nbd doctor` needs to know, too.
var guestSettings = []setting{
	{"accel", "auto", "kvm, tcg, or auto: KVM if a guest really boots with it"},
	{"kernel", "", "kernel of the guests: a file, or a name that nbd kernel list prints (default: the first)"},
	{"qemu", "", "qemu-system-x86_64 (default: searched in PATH)"},
	{"sandbox-shell", "", "static shell that is /bin/sh in a build (default: busybox, searched)"},
	{"cold-boot", false, "boot every guest instead of restoring a booted template"},
}

// A config is the table with the values of one invocation.
type config struct {
	flags *pflag.FlagSet
	file  string
}

// newConfig adds flags for the settings, --state and --config to a command.
func newConfig(cmd *cobra.Command, tables ...[]setting) *config {
	c := &config{flags: cmd.Flags()}
	c.flags.StringVar(&c.file, "config", "", "TOML file with any of these settings")
	c.flags.String("state", defaultState(), "directory of the server's state")
	for _, table := range tables {
		for _, s := range table {
			switch v := s.value.(type) {
			case bool:
				c.flags.Bool(s.name, v, s.usage)
			case uint:
				c.flags.Uint(s.name, v, s.usage)
			case time.Duration:
				c.flags.Duration(s.name, v, s.usage)
			case string:
				c.flags.String(s.name, v, s.usage)
			}
		}
	}
	return c
}

// load fills what no flag gave from the environment and the file.
func (c *config) load() error {
	file, err := c.readFile()
	if err != nil {
		return err
	}
	var errs []error
	c.flags.VisitAll(func(f *pflag.Flag) {
		if f.Changed || f.Name == "config" || f.Name == "help" {
			return
		}
		env := "NBD_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		if v := os.Getenv(env); v != "" {
			if err := f.Value.Set(v); err != nil {
				errs = append(errs, fmt.Errorf("setting %s: environment %s: %w", f.Name, env, err))
			}
		} else if v, ok := file[f.Name]; ok {
			if err := f.Value.Set(v); err != nil {
				errs = append(errs, fmt.Errorf("%s: %s: %w", c.file, f.Name, err))
			}
		}
		delete(file, f.Name)
	})
	for name := range file {
		// A file is shared between commands, which do not all have all settings.
		if !isSetting(name) {
			errs = append(errs, &server.HintError{Err: fmt.Errorf("%s: there is no setting %q", c.file, name),
				Hint: "`nbd serve --help` lists them; the names are the same"})
		}
	}
	return errors.Join(errs...)
}

// isSetting reports whether any table has a name.
func isSetting(name string) bool {
	for _, table := range [][]setting{serveSettings, guestSettings} {
		for _, s := range table {
			if s.name == name {
				return true
			}
		}
	}
	return name == "state"
}

// readFile returns the file's values as text; a list has commas.
func (c *config) readFile() (map[string]string, error) {
	if c.file == "" {
		c.file = os.Getenv("NBD_CONFIG")
	}
	if c.file == "" {
		return nil, nil
	}
	b, err := os.ReadFile(c.file)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	var raw map[string]any
	if err := toml.Unmarshal(b, &raw); err != nil {
		var at *toml.DecodeError
		if errors.As(err, &at) {
			row, col := at.Position()
			return nil, fmt.Errorf("%s:%d:%d: %w", c.file, row, col, err)
		}
		return nil, fmt.Errorf("%s: %w", c.file, err)
	}
	values := map[string]string{}
	for name, v := range raw {
		switch v := v.(type) {
		case []any:
			list := make([]string, len(v))
			for i := range v {
				list[i] = fmt.Sprint(v[i])
			}
			values[name] = strings.Join(list, ",")
		case map[string]any:
			return nil, fmt.Errorf("%s: [%s]: there are no sections, only names and values", c.file, name)
		default:
			values[name] = fmt.Sprint(v)
		}
	}
	return values, nil
}

func (c *config) text(name string) string { return c.flags.Lookup(name).Value.String() }

// get returns the value of a setting of type T, which its table gave it.
func get[T bool | uint | time.Duration](c *config, name string) (v T) {
	var err error
	switch v := any(&v).(type) {
	case *bool:
		*v, err = c.flags.GetBool(name)
	case *uint:
		*v, err = c.flags.GetUint(name)
	case *time.Duration:
		*v, err = c.flags.GetDuration(name)
	}
	if err != nil {
		panic(err) // the table has no such setting
	}
	return v
}

// number returns a setting that is a number.
func (c *config) number(name string) int { return int(get[uint](c, name)) }

// list returns a setting with commas or spaces in it; nil if it is empty.
func (c *config) list(name string) []string {
	if c.text(name) == "" {
		return nil
	}
	return strings.FieldsFunc(c.text(name), func(r rune) bool { return r == ',' || r == ' ' })
}

// defaultState is where the server keeps what it knows if nobody says.
func defaultState() string {
	if os.Geteuid() == 0 {
		return "/var/lib/nbd"
	}
	dir := os.Getenv("XDG_STATE_HOME")
	if dir == "" {
		dir = filepath.Join(os.Getenv("HOME"), ".local", "state")
	}
	return filepath.Join(dir, "nbd")
}

// The server.

func serveCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "serve", Short: "Run the builder", Args: exactArgs(),
		Long: `Run the builder until SIGTERM, which lets running builds finish for a while; a
second one ends at once. Every setting below may also come from the environment
(NBD_SSH_LISTEN for --ssh-listen) or from a TOML file (ssh-listen = "…"); a flag
wins over the environment, that over the file.`}
	cfg := newConfig(cmd, serveSettings, guestSettings)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := cfg.load(); err != nil {
			return err
		}
		log, err := cfg.logger(cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		// Ingest allocates little and holds less: collecting less often is
		// worth a fifth of its CPU time.
		debug.SetGCPercent(800)
		debug.SetMemoryLimit(1 << 30)
		return serve(cmd.Context(), cfg, log)
	}
	return cmd
}

// logger returns the server's logger.
func (c *config) logger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.text("log-level"))); err != nil {
		return nil, fmt.Errorf("log-level: %q is none of debug, info, warn and error", c.text("log-level"))
	}
	opts := &slog.HandlerOptions{Level: level}
	switch format := c.text("log-format"); format {
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	default:
		return nil, fmt.Errorf("log-format: %q is neither text nor json", format)
	}
}

// guests turns the guest settings into the Config of package vm.
func (c *config) guests(log *slog.Logger) vm.Config {
	return vm.Config{StateDir: c.text("state"), QEMU: c.text("qemu"), Kernel: c.text("kernel"),
		Accel: c.text("accel"), Busybox: c.text("sandbox-shell"), ColdBoot: get[bool](c, "cold-boot"), Logger: log}
}

// serve joins the packages and runs them until a signal ends them.
func serve(ctx context.Context, cfg *config, log *slog.Logger) error {
	state := cfg.text("state")
	guests := cfg.guests(log)
	name := cfg.text("server-name")
	if name == "" {
		host, err := os.Hostname()
		if err != nil {
			return err
		}
		name = host
	}
	storeConfig := store.Config{ServerName: name, MinFree: int64(cfg.number("min-free")) << 20, Logger: log}
	builds := server.BuildsConfig{CPUs: cfg.number("default-cpu"), MemoryMiB: cfg.number("default-mem"),
		MaxMemoryMiB: cfg.number("max-mem"), ScratchMiB: cfg.number("scratch"), Logger: log,
		Room:   server.Room{Guests: cfg.number("max-guests"), MemoryMiB: cfg.number("memory")},
		Limits: server.Limits{MaxLogSize: int64(cfg.number("max-log-size"))}}
	front := server.Config{Version: server.Version(), Logger: log, TempDir: filepath.Join(state, "tmp"), Ciphers: cfg.list("ciphers"), MaxUnauthenticated: cfg.number("max-unauthenticated"),
		MaxConnections:   cfg.number("max-connections"),
		HandshakeTimeout: get[time.Duration](cfg, "handshake-timeout"), KeepAlive: get[time.Duration](cfg, "keep-alive")}
	grace := get[time.Duration](cfg, "drain-timeout")
	listener, err := net.Listen("tcp", cfg.text("ssh-listen"))
	if err != nil {
		return &server.HintError{Err: err, Hint: "choose another address with --ssh-listen"}
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
	runner, err := vm.New(guests)
	if err != nil {
		return err
	}
	defer closeLogged(log, "the guests", runner)
	builds.Store, builds.Runner = st, runner
	front.Store = st
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
	return b.OpenBlob(ctx, h)
}

// Commands that ask a running server.

// An adminFlags is what all commands of `nbd admin` share.
type adminFlags struct {
	cfg  *config
	json bool
}

func (a *adminFlags) client() *server.AdminClient {
	return server.NewAdminClient(a.cfg.text("state"))
}

// print writes v as JSON if that was asked for, else what text writes.
func (a *adminFlags) print(cmd *cobra.Command, v any, text func(w io.Writer)) error {
	out := cmd.OutOrStdout()
	if a.json {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	text(w)
	return w.Flush()
}

func adminCommand() *cobra.Command {
	a := &adminFlags{}
	cmd := &cobra.Command{Use: "admin", Short: "Rule a running server, on its machine"}
	a.cfg = &config{flags: cmd.PersistentFlags()}
	a.cfg.flags.String("state", defaultState(), "directory of the server's state")
	a.cfg.flags.BoolVar(&a.json, "json", false, "print JSON")
	cmd.PersistentPreRunE = func(*cobra.Command, []string) error { return a.cfg.load() }
	account := &cobra.Command{Use: "account", Short: "Accounts: add, list, remove"}
	account.AddCommand(a.accountAdd(), a.accountList(), a.accountRemove())
	key := &cobra.Command{Use: "key", Short: "SSH keys of accounts: add, list, remove"}
	key.AddCommand(a.keyAdd(), a.keyList(), a.keyRemove())
	cmd.AddCommand(account, key, a.status(), a.check(), a.gc())
	for _, c := range []*cobra.Command{cmd, account, key} {
		c.RunE = needsCommand
	}
	return cmd
}

// needsCommand is run by a command that only has commands below it.
func needsCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	return usageError{fmt.Errorf("%s has no command %q", cmd.CommandPath(), args[0])}
}

// exactArgs wants as many arguments as there are names.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(names) {
			return usageError{fmt.Errorf("%s takes %s", cmd.CommandPath(), cmp.Or(strings.Join(names, " "), "no arguments"))}
		}
		return nil
	}
}

// ask makes a command that asks the server for a T and prints it: as JSON, or as
// text does.
func ask[T any](a *adminFlags, use, short string, args cobra.PositionalArgs,
	get func(ctx context.Context, args []string) (T, error), text func(w io.Writer, v T)) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: args, RunE: func(cmd *cobra.Command, args []string) error {
		v, err := get(cmd.Context(), args)
		if err != nil {
			return err
		}
		return a.print(cmd, v, func(w io.Writer) { text(w, v) })
	}}
}

// A done is the answer of a command that has nothing else to tell.
type done struct {
	Removed string `json:"removed"`
}

func printDone(w io.Writer, d done) { fmt.Fprintln(w, "removed", d.Removed) }

func (a *adminFlags) accountAdd() *cobra.Command {
	var files []string
	cmd := ask(a, "add NAME --ssh-key FILE", "Make an account and let its keys in", exactArgs("NAME"),
		func(ctx context.Context, args []string) (acc server.AccountInfo, err error) {
			keys, err := server.ReadKeyFiles(files)
			if err != nil {
				return acc, err
			}
			return a.client().AddAccount(ctx, server.NewKeys{Account: args[0], Keys: keys})
		},
		func(w io.Writer, acc server.AccountInfo) {
			fmt.Fprintf(w, "account %s\nsigns with %s\n", acc.Name, acc.PublicKey)
			for _, k := range acc.Keys {
				fmt.Fprintf(w, "key %s %s\n", k.Fingerprint, k.Comment)
			}
		})
	cmd.Flags().StringArrayVar(&files, "ssh-key", nil, "file with public SSH keys, - for standard input; may be repeated")
	return cmd
}

func (a *adminFlags) accountList() *cobra.Command {
	return ask(a, "list", "List accounts", exactArgs(),
		func(ctx context.Context, _ []string) ([]server.AccountInfo, error) { return a.client().Accounts(ctx) },
		func(w io.Writer, list []server.AccountInfo) {
			for _, acc := range list {
				fmt.Fprintf(w, "%s\t%d keys\t%s\n", acc.Name, len(acc.Keys), acc.PublicKey)
			}
		})
}

func (a *adminFlags) accountRemove() *cobra.Command {
	return ask(a, "remove NAME", "Remove an account with its keys and all it has in the store", exactArgs("NAME"),
		func(ctx context.Context, args []string) (done, error) {
			return done{args[0]}, a.client().RemoveAccount(ctx, args[0])
		}, printDone)
}

func (a *adminFlags) keyAdd() *cobra.Command {
	var permissions []string
	cmd := ask(a, "add ACCOUNT FILE", "Let a key into an account", exactArgs("ACCOUNT", "FILE"),
		func(ctx context.Context, args []string) ([]server.KeyInfo, error) {
			keys, err := server.ReadKeyFiles(args[1:])
			if err != nil {
				return nil, err
			}
			return a.client().AddKeys(ctx, server.NewKeys{Account: args[0], Keys: keys, Permissions: permissions})
		}, printKeys)
	cmd.Flags().StringSliceVar(&permissions, "permissions", nil,
		"what it may do, of build:read, build:write, store:read, store:write, account:read, account:write (default: all)")
	return cmd
}

func printKeys(w io.Writer, list []server.KeyInfo) {
	for _, k := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", k.Account, k.Fingerprint, k.Type, strings.Join(k.Permissions, ","), k.Comment)
	}
}

func (a *adminFlags) keyList() *cobra.Command {
	return ask(a, "list [ACCOUNT]", "List keys", cobra.MaximumNArgs(1),
		func(ctx context.Context, args []string) ([]server.KeyInfo, error) {
			return a.client().Keys(ctx, strings.Join(args, ""))
		}, printKeys)
}

func (a *adminFlags) keyRemove() *cobra.Command {
	return ask(a, "remove FINGERPRINT", "Shut a key out", exactArgs("FINGERPRINT"),
		func(ctx context.Context, args []string) (done, error) {
			return done{args[0]}, a.client().RemoveKey(ctx, args[0])
		}, printDone)
}

func (a *adminFlags) status() *cobra.Command {
	return ask(a, "status", "Tell how the server does", exactArgs(),
		func(ctx context.Context, _ []string) (server.Status, error) { return a.client().Status(ctx) },
		func(w io.Writer, s server.Status) { s.Print(w) })
}

func (a *adminFlags) gc() *cobra.Command {
	return ask(a, "gc", "Remove now the bytes that no account has any more, as the server does each hour", exactArgs(),
		func(ctx context.Context, _ []string) (server.Freed, error) { return a.client().GC(ctx) },
		func(w io.Writer, f server.Freed) { fmt.Fprintf(w, "freed %d MiB\n", f.Bytes>>20) })
}

func (a *adminFlags) check() *cobra.Command {
	var readData bool
	var report store.Report
	cmd := ask(a, "check", "Prove the store: that all is there, and with --read-data that it is right", exactArgs(),
		func(ctx context.Context, _ []string) (r store.Report, err error) {
			report, err = a.client().Check(ctx, readData)
			return report, err
		},
		func(w io.Writer, r store.Report) {
			fmt.Fprintf(w, "%d accounts, %d paths, %d NARs, %d MiB\n", r.Accounts, r.Paths, r.Blobs, r.Bytes>>20)
			for _, p := range r.Problems {
				fmt.Fprintln(w, p)
			}
		})
	cmd.PostRunE = func(*cobra.Command, []string) error {
		if !report.OK() {
			return fmt.Errorf("the store has %d faults", len(report.Problems)+report.More)
		}
		return nil
	}
	cmd.Flags().BoolVar(&readData, "read-data", false, "read and hash every byte")
	return cmd
}

// Commands that need no server.

func kernelCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "kernel", Short: "Kernels for guests: import, list", RunE: needsCommand}
	cfg := &config{flags: cmd.PersistentFlags()}
	cfg.flags.String("state", defaultState(), "directory of the server's state")
	cmd.PersistentPreRunE = func(*cobra.Command, []string) error { return cfg.load() }
	cmd.AddCommand(
		&cobra.Command{Use: "import FILE|DIR", Args: exactArgs("FILE|DIR"),
			Short: "Keep a kernel from a package (.deb, .rpm) or from a folder with vmlinuz and its modules",
			RunE: func(cmd *cobra.Command, args []string) error {
				k, err := vm.ImportKernel(cfg.text("state"), args[0])
				if err == nil {
					fmt.Fprintln(cmd.OutOrStdout(), "imported", k.Name)
				}
				return err
			}},
		&cobra.Command{Use: "list", Args: exactArgs(), Short: "List kernels that guests could run, the one to be used first",
			RunE: func(cmd *cobra.Command, _ []string) error {
				list, err := vm.Kernels(cfg.text("state"))
				if err != nil {
					return err
				}
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
				for _, k := range list {
					fmt.Fprintf(w, "%s\t%s\t%s\n", k.Name, map[bool]string{true: "imported", false: "host"}[k.Imported], k.Image)
				}
				return w.Flush()
			}})
	return cmd
}

func setupCommand() *cobra.Command {
	var host, port, kind string
	cmd := &cobra.Command{Use: "setup", Short: "Print the configuration that a client needs", Args: exactArgs()}
	cfg := newConfig(cmd, nil)
	cmd.Flags().StringVar(&host, "host", "", "name or address by which clients reach this machine")
	cmd.Flags().StringVar(&port, "port", "", "port by which they do (default: the one the server listens on)")
	cmd.Flags().StringVar(&kind, "for", "nix.conf", strings.Join(server.SetupKinds, ", "))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := cfg.load(); err != nil {
			return err
		}
		text, err := server.NewAdminClient(cfg.text("state")).Setup(cmd.Context(), host, port, kind)
		if err == nil {
			fmt.Fprint(cmd.OutOrStdout(), text)
		}
		return err
	}
	return cmd
}

func doctorCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "doctor", Short: "Prove each part that a build needs, boot a guest, say how to mend what is wrong", Args: exactArgs()}
	cfg := newConfig(cmd, guestSettings)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := cfg.load(); err != nil {
			return err
		}
		return server.Doctor(cmd.Context(), cfg.guests(slog.New(slog.DiscardHandler)), cmd.OutOrStdout())
	}
	return cmd
}

func versionCommand() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Print the version", Args: exactArgs(),
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), "nbd", server.Version()) }}
}
