document.addEventListener("DOMContentLoaded", () => {
  // A click on a figure, or Enter, shows it as large as the window; a second one, or Escape, closes it.
  const dialog = document.createElement("dialog");
  dialog.className = "figure";
  dialog.addEventListener("click", () => dialog.close());
  document.body.append(dialog);
  for (const image of document.querySelectorAll("article img")) {
    const button = document.createElement("button");
    button.className = "enlarge";
    button.title = "Enlarge";
    image.replaceWith(button);
    button.append(image);
    button.addEventListener("click", () => {
      dialog.replaceChildren(image.cloneNode());
      dialog.showModal();
    });
  }
  // Tables in the outputs of notebooks scroll, as those of the text do.
  for (const table of document.querySelectorAll("article table.dataframe")) {
    const wrapper = document.createElement("div");
    wrapper.className = "table-wrapper";
    table.replaceWith(wrapper);
    wrapper.append(table);
  }
});
