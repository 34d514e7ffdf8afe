package admincli

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"nbd/server/adminapi"
	"nbd/server/settings"
)

// settingOps are the flags that change a setting.
var settingOps = []struct{ name, usage string }{
	{"set", "set it; a list has commas or spaces"},
	{"add", "add to a list"},
	{"remove", "remove from a list"},
}

func (a *flags) settings() *cobra.Command {
	var owner adminapi.SettingsOwner
	var change adminapi.SettingChange
	cmd := &cobra.Command{Use: "settings [NAME]", Short: "Show and change settings, of all accounts or of one",
		Long: "Show and change settings. Without --account and --key they are the system's,\n" +
			"which count for all accounts that have none of their own, and are ceilings for\n" +
			"the limits of these.\n\n" + settings.Help(),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return UsageError{errors.New("nbd admin settings takes one NAME")}
			}
			return nil
		}}
	cmd.ValidArgsFunction = func(_ *cobra.Command, args []string, _ string) (names []string, _ cobra.ShellCompDirective) {
		if len(args) == 0 {
			for _, s := range settings.All() {
				names = append(names, s.Name+"\t"+s.Usage)
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
	cmd.Flags().StringVar(&owner.Account, "account", "", "those of an account")
	cmd.Flags().StringVar(&owner.Key, "key", "", "those of an SSH key, by its fingerprint")
	cmd.Flags().Bool("show", false, "show the value and where it is from")
	cmd.Flags().Bool("reset", false, "forget what was set")
	for _, op := range settingOps {
		cmd.Flags().StringVar(&change.Value, op.name, "", op.usage)
	}
	cmd.MarkFlagsMutuallyExclusive("show", "reset", "set", "add", "remove")
	if err := cmd.RegisterFlagCompletionFunc("account", a.accountNames(1<<10)); err != nil {
		panic(err) // there is no such flag
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		for _, name := range []string{"set", "add", "remove", "reset"} {
			if cmd.Flags().Changed(name) {
				change.Op = name
			}
		}
		change.SettingsOwner = owner
		if change.Op == "" {
			return a.showSettings(cmd, owner, args)
		}
		if len(args) == 0 {
			return UsageError{fmt.Errorf("name the setting to %s", change.Op)}
		}
		change.Name = args[0]
		s, err := a.client().ChangeSetting(cmd.Context(), change)
		if err != nil {
			return err
		}
		return a.print(cmd, s, func(w io.Writer) { printSetting(w, &s) })
	}
	return cmd
}

// showSettings prints all settings of an owner, or the one that is named.
func (a *flags) showSettings(cmd *cobra.Command, owner adminapi.SettingsOwner, args []string) error {
	name := ""
	if len(args) > 0 {
		name = args[0]
	}
	list, err := a.client().Settings(cmd.Context(), owner, name)
	if err != nil {
		return err
	}
	var answer any = list
	if name != "" && len(list) == 1 {
		answer = list[0]
	}
	return a.print(cmd, answer, func(w io.Writer) {
		for i := range list {
			printSetting(w, &list[i])
		}
	})
}

func printSetting(w io.Writer, s *adminapi.Setting) {
	text := s.Text
	if text == "" {
		text = "-"
	}
	fmt.Fprintf(w, "%s\t%s\t%s\n", s.Name, text, s.Origin)
}

func (a *flags) link() *cobra.Command {
	return ask(a, "link A B", "Let two accounts use what either has, as if both had asked for it", ExactArgs("A", "B"),
		func(ctx context.Context, args []string) (adminapi.Link, error) {
			return a.client().Link(ctx, adminapi.Link{A: args[0], B: args[1]})
		},
		func(w io.Writer, l adminapi.Link) { fmt.Fprintln(w, "linked", l.A, "and", l.B) })
}

func (a *flags) unlink() *cobra.Command {
	return ask(a, "unlink A B", "End that", ExactArgs("A", "B"),
		func(ctx context.Context, args []string) (adminapi.Link, error) {
			return a.client().Unlink(ctx, adminapi.Link{A: args[0], B: args[1]})
		},
		func(w io.Writer, l adminapi.Link) { fmt.Fprintln(w, "unlinked", l.A, "and", l.B) })
}
